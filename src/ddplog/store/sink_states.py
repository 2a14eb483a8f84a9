"""What a sink's forwarder last said of itself, `<run_dir>/sinks/<name>/state.json`: one shape for whoever reads it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkState:
    """How far a sink is."""

    name: str
    state: str
    """starting, running, retrying, failed, drained; `unreadable` where the file is not what it should be."""
    cursor: int = 0
    through: int = 0
    """Ids up to here were looked for in the store when nothing was left to deliver; ids have gaps."""
    lag: int = 0
    """Emissions the sink has not confirmed; ids have gaps, so an upper bound."""
    detail: str = ""
    num_delivered: int | None = None
    """Emissions with an id up to the cursor that the sink took; None: they were not counted."""
    num_dead: int = 0
    """Those that it refused for good: they are in dead.jsonl."""
    time_unix_ns: int = 0


def read_sink_state(path: Path) -> SinkState:
    """Return what a state.json says."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        return SinkState(
            name=str(raw.get("name", path.parent.name)),
            state=str(raw["state"]),
            cursor=int(raw.get("cursor") or 0),
            through=int(raw.get("through") or 0),
            lag=int(raw.get("lag") or 0),
            detail=str(raw.get("detail") or ""),
            num_delivered=None if raw.get("num_delivered") is None else int(raw["num_delivered"]),
            num_dead=int(raw.get("num_dead") or 0),
            time_unix_ns=int(raw.get("time_unix_ns") or 0),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as exc:
        return SinkState(name=path.parent.name, state="unreadable", detail=f"{type(exc).__name__}: {exc}")


def read_sink_states(run_dir: Path) -> tuple[SinkState, ...]:
    """Return the states of a run's sinks, by name."""
    return tuple(read_sink_state(path) for path in sorted(run_dir.glob("sinks/*/state.json")))
