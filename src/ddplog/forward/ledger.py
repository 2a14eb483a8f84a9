"""Owns the files in which a forwarder keeps its state, `<run_dir>/sinks/<folder name>/`. Decides nothing.

lock          POSIX record lock: one forwarder per sink
cursor.json   {"format": 1, "cursor": int, "position": object | null, "store_uuid": hex, "num_delivered": int,
              "num_dead": int, "rewinds": [[attempt, step, key]]}; replaced, durable. Every emission with id <= cursor is in the sink or in dead.jsonl,
              and counted as such.
dead.jsonl    refused for good: one emission a line as in the JSONL sink, plus "reason"; durable before the
              cursor passes it
state.json    {"name", "state", "cursor", "through", "lag", "detail", "num_delivered", "num_dead", "time_unix_ns"};
              replaced, not durable: for people, and for the aggregator, which starts it again if a drained sink has
              not all there is.
              state: starting, running, retrying, failed, drained
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Final

from ddplog.core.delivery import Dead, Position
from ddplog.errors import PermanentSinkError
from ddplog.forward.rewinds import Rewind
from ddplog.journal.spool import sync_directory, write_atomic
from ddplog.sinks.jsonl import as_object, encode_line
from ddplog.store.sink_states import SinkState

FORMAT: Final = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cursor:
    """How far a sink is."""

    cursor: int = 0
    position: Position | None = None
    store_uuid: str = ""
    num_delivered: int = 0
    num_dead: int = 0
    rewinds: tuple[Rewind, ...] = ()


class Ledger:
    """One sink's folder, locked. Blocks on the disk only.

    Args:
        folder: Made if it is not there, but not the run's own folder above it.

    Raises:
        FileNotFoundError: If the run's folder is gone; so does every method.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = -1
        self._dead_ids: set[int] | None = None
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(exist_ok=True)

    def __repr__(self) -> str:
        return f"Ledger({str(self.folder)!r}, locked={self._lock >= 0})"

    def try_lock(self) -> bool:
        """Take the lock. False if another process has it; it is released when this process ends."""
        descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            os.close(descriptor)
            return False
        self._lock = descriptor
        for left in self.folder.glob(".*.*.*"):  # replacements that a killed forwarder did not finish
            left.unlink(missing_ok=True)
        return True

    def unlock(self) -> None:
        """Release the lock; twice is allowed."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def read_cursor(self) -> Cursor:
        """Return how far the sink is; the start if it has no cursor yet.

        Raises:
            PermanentSinkError: If the file is not a cursor of this format.
        """
        path = self.folder / "cursor.json"
        try:
            raw = json.loads(path.read_bytes())
            found = raw["format"]
            cursor = Cursor(
                cursor=int(raw["cursor"]),
                position=raw["position"],
                store_uuid=str(raw.get("store_uuid", "")),
                num_delivered=int(raw.get("num_delivered") or 0),
                num_dead=int(raw.get("num_dead") or 0),
                rewinds=tuple(Rewind(int(a), int(step), str(key)) for a, step, key in raw.get("rewinds") or ()),
            )
        except FileNotFoundError:
            return Cursor()
        except (ValueError, KeyError, TypeError) as exc:
            raise PermanentSinkError(f"{path}: not a cursor ({exc!r}); without it everything is sent again") from exc
        if found != FORMAT:
            raise PermanentSinkError(f"{path}: format {found!r}; this ddplog knows {FORMAT}")
        return cursor

    def write_cursor(self, cursor: Cursor) -> None:
        """Replace the cursor; durable on return."""
        raw = {
            "format": FORMAT,
            "cursor": cursor.cursor,
            "position": cursor.position,
            "store_uuid": cursor.store_uuid,
            "num_delivered": cursor.num_delivered,
            "num_dead": cursor.num_dead,
            "rewinds": [astuple(rewind) for rewind in cursor.rewinds],
        }
        write_atomic(self.folder / "cursor.json", json.dumps(raw).encode())

    def bury(self, dead: Dead) -> None:
        """Append a dead emission, unless a life before this one did; durable on return."""
        path = self.folder / "dead.jsonl"
        if self._dead_ids is None:
            self._dead_ids = _read_ids(path)
        if dead.emission.id in self._dead_ids:
            return
        with path.open("ab") as file:
            file.write(encode_line({**as_object(dead.emission), "reason": dead.reason}))
            file.flush()
            os.fsync(file.fileno())
        sync_directory(self.folder)
        self._dead_ids.add(dead.emission.id)

    def write_state(self, state: SinkState) -> None:
        """Replace state.json, atomically for readers; not durable."""
        raw: Mapping[str, Any] = {name: getattr(state, name) for name in SinkState.__slots__}
        temporary = self.folder / f".state.json.{os.getpid()}.new"
        temporary.write_bytes(json.dumps(raw, ensure_ascii=False).encode("utf-8", "replace"))
        temporary.replace(self.folder / "state.json")


def _read_ids(path: Path) -> set[int]:
    """Return the ids of the whole lines, and cut a line that a crash left half-written."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return set()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)
    return {json.loads(line)["id"] for line in data[:whole].splitlines()}
