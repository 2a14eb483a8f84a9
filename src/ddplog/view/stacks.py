"""Decides how ranks' Python stacks are shown: ranks that are at the same places together, the odd ones first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from ddplog.core.stacks import alike, parse, place
from ddplog.view.text import count, status_words, words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from ddplog.store.reader import Run
    from ddplog.v1.control_pb2 import RankStack

_MAX_LINE = 1000


def stored(run: Run) -> list[RankStack]:
    """Return the newest stacks of each rank of the newest attempt that the store has."""
    from ddplog.v1.control_pb2 import RankStack

    attempt = run.attempts[-1].attempt if run.attempts else 0
    found: dict[int, RankStack] = {}
    for event in run.events():
        if event.kind == "stack" and event.attempt == attempt and event.rank is not None:
            text = str(event.data.get("text", ""))
            found[event.rank] = RankStack(rank=event.rank, text=text, trouble="" if text else event.message)
            if event.step is not None:
                found[event.rank].step = event.step
    return [found[rank] for rank in sorted(found)]


def render(stacks: Sequence[RankStack]) -> RenderableType:
    """Return the stacks, and below them the ranks that have none."""
    by_rank = {stack.rank: stack for stack in stacks}
    parts: list[RenderableType] = []
    for ranks, text in alike((stack.rank, stack.text) for stack in stacks if stack.text):
        if parts:
            parts.append("")
        parts += [_heading(by_rank[rank]) for rank in ranks]
        parts.append(words(f"at {place(text)}", "bold", limit=_MAX_LINE))
        parts += [words(line, limit=_MAX_LINE) for line in text.rstrip("\n").split("\n")]
    missing = [stack for stack in stacks if not stack.text]
    if missing and parts:
        parts.append("")
    parts += [_heading(stack).append_text(words(f": {stack.trouble}", "yellow")) for stack in missing]
    return Group(*parts) if parts else Text("no living rank", style="dim")


def _heading(stack: RankStack) -> Text:
    line = Text(f"rank {stack.rank}", style="bold")
    if stack.state:
        line.append(" ").append_text(status_words(stack.state))
    if stack.HasField("step"):
        line.append(f", step {count(stack.step)}")
    if stack.pid:
        line.append_text(words(f", pid {stack.pid} on {stack.host}", "dim"))
    return line


def as_dicts(stacks: Sequence[RankStack]) -> list[dict[str, Any]]:
    """Return the stacks for JSON."""
    return [
        {
            "rank": stack.rank,
            "host": stack.host,
            "pid": stack.pid,
            "state": stack.state,
            "step": stack.step if stack.HasField("step") else None,
            "at": place(stack.text) if stack.text else None,
            "trouble": stack.trouble or None,
            "threads": [
                {"thread": thread.ident, "frames": [frame._asdict() for frame in thread.frames]}
                for thread in parse(stack.text)
            ],
            "text": stack.text,
        }
        for stack in stacks
    ]
