"""The sampler's process: one per run per node, started and watched by the agent (keeper.py), which never calls a driver
itself. Writes a system journal for every living rank of the node, and nothing else.

A sample is taken when a rank is new, and then once in every `sample_s`, at whole multiples of it since the run was begun:
its step is that many seconds, the same for all ranks of all nodes. One record of a rank holds its process, its step and
its GPU; the node's lowest rank has the host's in another. The GPUs come last: a driver that hangs costs no more than
what comes from it.

Every round writes a byte to stdout, a pipe of the agent's: a sampler that is silent hangs and is killed. If the pipe has
no reader the agent is gone, and so is the sampler: the next agent starts another.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from ddplog.agent.keeper import Plan
from ddplog.core.records import SYSTEM_PREFIX
from ddplog.errors import RemoteProtocolError
from ddplog.journal.pace import Pace
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import SYSTEM_FOLDER, is_system
from ddplog.journal.writer import JournalFullError, JournalWriter
from ddplog.sampling.assign import Gpu, assigned, visible
from ddplog.sampling.host import Host, Process
from ddplog.sampling.nvml import NoGpusError, Nvml

_logger = logging.getLogger("ddplog.sampler")

_ROUND_S: Final = 0.1
_DISCOVER_ROUNDS: Final = 5
_SEGMENT_BYTES: Final = 64 * 1024
"""A quarter of an hour of samples."""
_SPOOL_BYTES: Final = 64 * 1024 * 1024
"""Of one rank's samples while nobody takes them: 10 days."""
MAX_RANKS: Final = 256
"""Of one node; more are not sampled. Each has a journal, and a look at /proc every time."""
_COPIED: Final = (
    "rank", "world_size", "local_rank", "local_world_size", "node_rank", "launcher", "host", "boot_id", "run_id",
)  # fmt: skip
"""Of the rank's identity."""


class Sampled:
    """A living rank, and the journal of its samples.

    Args:
        folder: Of its own journal.

    Raises:
        OSError, ValueError, RemoteProtocolError: If it cannot be read, or no other can be made.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = JournalReader(folder)
        self._pace = Pace(folder)
        its = self._reader.identity
        self.rank, self.local_rank = int(its["rank"]), int(its["local_rank"])
        self.visible: str | None = its.get("cuda_visible_devices")
        self.process = Process(self._reader.holder)
        self.taken = -1
        """The step of the last sample."""
        incarnation = secrets.token_bytes(16)
        its = {name: its[name] for name in _COPIED if name in its} | {
            "role": "system",
            "belongs_to": self._reader.incarnation.hex(),
            "pid": os.getpid(),
            "started_unix_ns": time.time_ns(),
        }
        try:
            self._writer = JournalWriter(
                folder.parent / f"{SYSTEM_FOLDER}{self.rank}.{incarnation.hex()}",
                incarnation,
                its,
                segment_bytes=_SEGMENT_BYTES,
                spool_bytes=_SPOOL_BYTES,
                check=lambda: None,
            )
        except BaseException:
            self._reader.close()
            raise

    @property
    def is_alive(self) -> bool:
        return self._reader.is_alive

    @property
    def step(self) -> int | None:
        """How far its training has come."""
        known = [step for step in (self._reader.step, self._pace.look()) if step is not None]
        return max(known, default=None)

    def write(self, second: int, values: Mapping[str, float]) -> None:
        """Append a record of metrics, named below `sys/`."""
        if not values:
            return
        keys = tuple(SYSTEM_PREFIX + name for name in values)
        self._append(len(keys), lambda writer: writer.append_scalars(keys, list(values.values()), second, 1.0))

    def tell(self, title: str, text: str, level: str) -> None:
        """Put an alert on the run."""
        message = {"type": "alert", "title": title, "text": text, "level": level}
        self._append(1, lambda writer: writer.append_message(message))

    def _append(self, num_values: int, append: Callable[[JournalWriter], None]) -> None:
        self._writer.enter()
        try:
            append(self._writer)
        except JournalFullError as exc:
            self._writer.drop(exc.reason, num_values)
        finally:
            self._writer.leave()

    def close(self) -> None:
        """Say that nothing more comes."""
        self._writer.enter()
        with suppress(JournalFullError):
            self._writer.append_last({"type": "finish", "status": "finished", "detail": ""})
        self._writer.leave()
        self._writer.close(finished=True)
        self._pace.close()
        self._reader.close()

    def __repr__(self) -> str:
        return f"<Sampled rank={self.rank} taken={self.taken}>"


class Sampler:
    """The process's state.

    Args:
        folder: The job's.
        plan: What is wanted.
        beat: Says that it lives.
    """

    def __init__(self, folder: Path, plan: Plan, beat: Callable[[], None]) -> None:
        self._folder = folder
        self._plan = plan
        self._beat = beat
        self.ranks: dict[str, Sampled] = {}
        self._ended: set[str] = set()
        self._host = Host()
        self._host_taken = -1
        self._nvml: Nvml | None = None
        self._is_nvml_open = not plan.with_gpus
        self._notice = plan.notice
        self._rounds = 0

    def round(self, now_unix_ns: int) -> None:
        """Look who lives, and take what samples are due."""
        self._beat()
        for name, sampled in list(self.ranks.items()):
            if not sampled.is_alive:
                sampled.close()
                self._ended.add(name)
                del self.ranks[name]
        if self._rounds % _DISCOVER_ROUNDS == 0:
            self._discover()
        self._rounds += 1
        second = self._second(now_unix_ns)
        due = [sampled for sampled in self.ranks.values() if sampled.taken < second]
        if due:
            self._sample(due, second)

    def _second(self, now_unix_ns: int) -> int:
        """Return the step of a sample that is taken now."""
        since_s = max(0, now_unix_ns - self._plan.created_unix_ns) / 1e9
        return int(since_s // self._plan.sample_s * self._plan.sample_s)

    def _discover(self) -> None:
        for path in sorted(self._folder.glob("*.*/head")):
            folder = path.parent
            if is_system(folder.name) or folder.name in self.ranks or folder.name in self._ended:
                continue
            if len(self.ranks) >= MAX_RANKS:
                return
            try:
                sampled = Sampled(folder)
            except (OSError, ValueError, KeyError, RemoteProtocolError) as exc:
                _logger.error("cannot sample %s: %s", folder, exc)
                self._ended.add(folder.name)
                continue
            self.ranks[folder.name] = sampled

    def _sample(self, due: list[Sampled], second: int) -> None:
        """Take samples: what needs no driver is in the journals before one is called."""
        first = min(self.ranks.values(), key=lambda sampled: (sampled.local_rank, sampled.rank))
        if self._notice:
            first.tell("sampler", self._notice, self._plan.notice_level)
            self._notice = ""
        if self._host_taken < second:
            self._host_taken = second
            first.write(second, _below("host", self._host.values()))
        for sampled in due:
            sampled.taken = second
            step = sampled.step
            values = {} if step is None else {"step": float(step)}
            sampled.write(second, values | _below("proc", sampled.process.values()))
        if not self._is_nvml_open:
            self._is_nvml_open = True
            try:
                self._nvml = Nvml(self._beat)
            except NoGpusError as exc:
                _logger.info("no GPU is sampled: %s", exc)
        if self._nvml is not None:
            self._sample_gpus(self._nvml, due, second)

    def _sample_gpus(self, nvml: Nvml, due: list[Sampled], second: int) -> None:
        devices = {sampled: visible(nvml.gpus, sampled.visible) for sampled in self.ranks.values()}
        processes = {
            uuid: nvml.processes(uuid) for uuid in dict.fromkeys(u for found in devices.values() for u in found)
        }
        own: dict[Sampled, str] = {}
        for sampled, found in devices.items():
            computing = {uuid for uuid in found if sampled.process.pid in processes[uuid]}
            uuid = assigned(found, sampled.local_rank, computing)
            if uuid is not None:
                own[sampled] = uuid
        values = {uuid: nvml.values(uuid) for uuid in dict.fromkeys(own[s] for s in due if s in own)}
        for sampled in due:
            if sampled in own:
                share = processes[own[sampled]].get(sampled.process.pid, {})
                sampled.write(second, values[own[sampled]] | _below("proc", share))
        for xid in nvml.xids():
            parts = _parts(nvml.gpus, xid.uuid, xid.gpu_instance)
            for sampled, uuid in own.items():
                if uuid in parts:
                    text = f"rank {sampled.rank}, GPU {uuid}" + (f" of {xid.uuid}" if uuid != xid.uuid else "")
                    sampled.tell(f"XID {xid.code}", text, "error")

    def close(self) -> None:
        """End every journal."""
        for sampled in self.ranks.values():
            sampled.close()
        self.ranks.clear()

    def __repr__(self) -> str:
        return f"<Sampler {self._folder.name} ranks={len(self.ranks)} {self._nvml!r}>"


def _below(name: str, values: Mapping[str, float]) -> dict[str, float]:
    return {f"{name}/{key}": value for key, value in values.items()}


def _parts(gpus: tuple[Gpu, ...], uuid: str, gpu_instance: int | None) -> set[str]:
    """Return the devices that an error of a GPU, or of a part of it, concerns."""
    gpu = next((gpu for gpu in gpus if gpu.uuid == uuid), None)
    if gpu is None:
        return set()
    if not gpu.is_split:
        return {uuid}
    return {part.uuid for part in gpu.instances if gpu_instance in (None, part.gpu_instance)}


class _Stop(BaseException):
    """The agent is gone, or wants no more."""


def _beat() -> None:
    try:
        os.write(1, b".")
    except BlockingIOError:  # it is stopped, or has more to do
        pass
    except BrokenPipeError:
        raise _Stop from None


def main() -> None:
    """Sample the ranks of the job folder in argv[1] as argv[2], a Plan, says, until SIGTERM or the agent's end."""
    folder, plan = Path(sys.argv[1]), Plan(**json.loads(sys.argv[2]))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s sampler %(process)d %(levelname)s %(message)s")
    os.set_blocking(1, False)
    is_asked: list[Any] = []
    signal.signal(signal.SIGTERM, lambda *_: is_asked.append(True))
    sampler = Sampler(folder, plan, _beat)
    try:
        while not is_asked:
            sampler.round(time.time_ns())
            time.sleep(_ROUND_S)
    except _Stop:
        pass
    sampler.close()


if __name__ == "__main__":
    main()
