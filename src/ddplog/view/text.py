"""Decides how values, times and untrusted words are shown. Pure: no clock, no terminal."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from rich.text import Text

if TYPE_CHECKING:
    from datetime import datetime

# C0, DEL and C1 steer a terminal; the bidirectional marks reorder what is read; lone surrogates cannot be encoded.
_UNSAFE: Final = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

STATUS_STYLES: Final = {
    "running": "bold cyan",
    "finished": "green",
    "failed": "bold red",
    "killed": "bold red",
    "died": "bold red",
    "preempted": "yellow",
    "unknown": "yellow",
    "unreadable": "red",
    "retrying": "yellow",
    "drained": "green",
    "starting": "cyan",
    "hung": "bold red",
    "straggler": "yellow",
    "idle": "yellow",
    "waiting": "yellow",
    "unseen": "yellow",
    "missing": "yellow",
    "duplicate": "bold red",
}


def clean(text: object) -> str:
    r"""Return text in which nothing can steer a terminal: ESC becomes \x1b, a right-to-left override \u202e."""
    return _UNSAFE.sub(_escaped, str(text))


def _escaped(match: re.Match[str]) -> str:
    char = match[0]
    code = ord(char)
    return _SHORT.get(char) or (f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def words(text: object, style: str = "", limit: int = 200) -> Text:
    """Return untrusted text for rich: control characters escaped, markup taken literally, shortened to `limit`."""
    shown = clean(text)
    return Text(shown if len(shown) <= limit else shown[: limit - 1] + "…", style=style)


def status_words(status: str, detail: str = "") -> Text:
    """Return a status in its colour, with its detail in brackets."""
    shown = words(status, STATUS_STYLES.get(status, ""))
    return shown.append_text(words(f" ({detail})", "dim")) if detail else shown


def number(value: float | None) -> str:
    """Return a value with 6 significant digits; "-" where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.6g}"


def count(value: int) -> str:
    """Return a count with thin groups: 1,234,567."""
    return f"{value:,}"


def seconds(value: float) -> str:
    """Return a duration: 820 ms, 12.3 s, 4m 05s, 2h 03m, 3d 04h."""
    if value < 0:
        return "-" + seconds(-value)
    if value < 1:
        return f"{value * 1000:.3g} ms"
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes}m {rest:02d}s"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours}h {minutes:02d}m"
    return f"{hours // 24}d {hours % 24:02d}h"


def size(num_bytes: float) -> str:
    """Return a size: 512 B, 1.5 MiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def moment(when: datetime | None) -> str:
    """Return a time of day in local time, to the second."""
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S") if when else "-"


def interest(key: str) -> tuple[int, str]:
    """Return a sort key: losses first, then scores, then the rest, what was measured and not logged last."""
    name = key.lower()
    head = name.partition("/")[0]
    if head in ("sys", "system", "gpu", "host", "node", "cuda", "perf", "optim"):
        return 3, key
    if "loss" in name or "perplexity" in name:
        return 0, key
    return (1 if any(word in name for word in ("acc", "score", "error", "f1", "auc", "bleu")) else 2), key


def how_ended(exit_code: int | None, signal: int | None, detail: str) -> str:
    """Return how a rank ended, in a few words: `exit code 1, ValueError: ...`, `signal 9 (SIGKILL)`."""
    seen = f"exit code {exit_code}" if exit_code is not None else ""
    if signal:
        seen = f"signal {signal}{_signal_name(signal)}"
    if seen and seen in detail:
        return detail
    return ", ".join(part for part in (seen, detail) if part)


def _signal_name(number_: int) -> str:
    import signal

    try:
        return f" ({signal.Signals(number_).name})"
    except ValueError:
        return ""
