"""The agent's process: one per run per node. Owns the socket, the clock, and the aggregator it supervises.

Started by the first rank (journal/election.py), it holds agent.lock while it lives; a second one ends at once. It lives
until every rank of the node and what launched them are gone, everything is acknowledged, and the aggregator it
supervises, if there is one here, has finished.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from ddplog import killpoints
from ddplog.agent.exit_status import has_ended
from ddplog.agent.keeper import Keeper
from ddplog.agent.orphans import take_up
from ddplog.agent.shipper import Shipper
from ddplog.bootstrap import command
from ddplog.errors import RemoteProtocolError
from ddplog.journal.segment import is_held
from ddplog.journal.spool import DONE, JobInfo, boot_id, read_job, secret_path, start_ticks
from ddplog.wire.codec import SYSTEM_VERSION
from ddplog.wire.keys import aggregator_keys, load_secret, node_keys
from ddplog.wire.sockets import DealerEndpoint

_logger = logging.getLogger("ddplog.agent")

_IDLE_MS: Final = 50
_BUSY_MS: Final = 0
_DISCOVER_NS: Final = 100_000_000
_RESTART_BACKOFF_NS: Final = (0, 100_000_000, 500_000_000, 1_000_000_000, 5_000_000_000)
_STARTS_AFTER_PROGRESS: Final = 2
"""How many starts count against an aggregator that acknowledged something in its life: it was killed, it is not broken,
and waits 0.5 s at most. One that dies without an acknowledgement waits longer every time."""
_STARTS_AFTER_KILL: Final = 1
"""The same for one that was killed with -9, even in its start: that says nothing against it, and starting takes longer
than the 0.1 s between two starts."""
KEEP_DONE_S: Final = 3600.0
_GIVE_UP_NS: Final = 600_000_000_000
"""How long an agent whose ranks are gone tries to reach an aggregator before it leaves the rest to `ddplog sync`."""


class Agent:
    """The process's state."""

    def __init__(self, folder: Path, job: JobInfo, adopted: Sequence[Path]) -> None:
        self.folder = folder
        self.job = job
        self.secret = load_secret(folder / "secret")
        self.node_id = str(job.node_rank)
        self.shipper = Shipper(folder, job.run_id, self.node_id, int(job.settings["spool_bytes"]) // 2, adopted)
        self.keeper = Keeper(folder, float(job.settings.get("sample_s", 0.0)), self.shipper.abandon)
        self.is_sampling_over = False
        self.dealer: DealerEndpoint | None = None
        self.endpoint = ""
        self.num_joins = 0
        self.is_up = False
        self.aggregator: subprocess.Popen[bytes] | None = None
        self.num_starts = 0
        self.num_acked = 0
        self.started_ns = 0
        self.is_aggregator_done = False
        self.launcher = _pidfd(job.launcher_pid, job.launcher_ticks)
        self.over_since_ns: int | None = None
        self.discovered_ns = 0
        self.trouble = ""
        """The last error that it went on after."""

    def run(self) -> None:
        """Ship until there is nothing left to ship."""
        while True:
            try:
                if self._round(time.monotonic_ns()):
                    return
            except OSError as exc:
                # A disk, or too many open files. The dead ranks' journals have nobody else: go on, from what is
                # acknowledged.
                if not self.folder.is_dir():
                    raise
                if str(exc) != self.trouble:
                    _logger.error("going on after %r", exc)
                self.trouble = str(exc)
                self.shipper.joined()
            self._wait()

    def _round(self, now: int) -> bool:
        """Do what is due; return whether there is nothing left to do."""
        if now - self.discovered_ns > _DISCOVER_NS:
            self.discovered_ns = now
            self.shipper.discover()
        self.shipper.check_deaths(now)
        self._supervise(now)
        if self.discovered_ns == now and not self.is_up:
            self._connect()
        is_over = self._is_over(now) and self._end_sampling(now)
        if not is_over:
            self._sample(now)
        self._exchange(now, is_over=is_over)
        self.shipper.keep_durable(now)
        return is_over and self._may_leave(now)

    def _wait(self) -> None:
        timeout_ms = _BUSY_MS if self.shipper.has_more else _IDLE_MS
        if self.dealer is not None:
            self.dealer.poll(timeout_ms)
        else:
            time.sleep(_IDLE_MS / 1000)

    def _exchange(self, now: int, *, is_over: bool) -> None:
        dealer = self.dealer
        if dealer is None:
            return
        link = dealer.link()
        self.is_up = link.is_up
        if link.num_joins != self.num_joins:
            self.num_joins = link.num_joins
            self.shipper.joined()
        for data in dealer.recv_all():
            try:
                self.shipper.receive(data, now)
            except RemoteProtocolError as exc:
                _logger.warning("dropped a message of the aggregator: %s", exc)
        if not link.is_up:
            return
        for data in self.shipper.outgoing(now):
            if not dealer.send(data):
                self.shipper.joined()  # the queue is full: begin again from what is acknowledged
                break
            killpoints.reach("agent.after_send")
        beat = self.shipper.heartbeat(now, is_over=is_over)
        if beat is not None:
            dealer.send(beat)
            for data in self.shipper.byes():
                dealer.send(data)

    def _connect(self) -> None:
        """Find the run's aggregator: this launcher's own, or that of another launcher of the run on this machine."""
        try:
            info = json.loads((self.job.run_dir / "control.json").read_text())
        except (OSError, json.JSONDecodeError):
            return
        if info.get("boot_id") != boot_id() or info["endpoint"] == self.endpoint:
            return
        self.endpoint = info["endpoint"]
        if self.dealer is not None:
            self.dealer.close()
        self.num_joins = 0
        self.dealer = DealerEndpoint(
            keys=node_keys(self.secret, self.node_id), server_key=aggregator_keys(self.secret).public
        )
        self.dealer.connect(self.endpoint)

    # -- the aggregator

    def _supervise(self, now: int) -> None:
        if self.aggregator is not None:
            code = self.aggregator.poll()
            if code is None:
                return
            self.aggregator = None
            if code == 0:
                self.shipper.settle()
                self.is_aggregator_done = self.shipper.is_idle
                _logger.info("the aggregator has finished")
            else:
                _logger.warning("the aggregator ended with %d", code)
                if code == -signal.SIGKILL:
                    self.num_starts = min(self.num_starts, _STARTS_AFTER_KILL)
                elif self._num_acked() > self.num_acked:
                    self.num_starts = min(self.num_starts, _STARTS_AFTER_PROGRESS)
        if self.is_aggregator_done and not self.shipper.is_idle:
            self.is_aggregator_done = False  # a rank has come back: torchrun restarted the group
            self.num_starts = 0
        if self.is_aggregator_done or not self.shipper.has_rank_zero or self._has_other():
            return
        if now - self.started_ns < _RESTART_BACKOFF_NS[min(self.num_starts, len(_RESTART_BACKOFF_NS) - 1)]:
            return
        self.num_starts += 1
        self.started_ns = now
        self.num_acked = self._num_acked()
        with (self.folder / "logs" / "aggregator.log").open("ab") as log:
            self.aggregator = subprocess.Popen(
                command("ddplog.aggregator.process", str(self.folder)),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _num_acked(self) -> int:
        return sum(tracked.acked_seq for tracked in self.shipper.tracked.values())

    def _has_other(self) -> bool:
        """Whether another aggregator than our child writes the run: an earlier agent's, or another launcher's."""
        return self.aggregator is None and is_held(self.job.run_dir / "writer.lock")

    # -- the sampler

    def _sample(self, now: int) -> None:
        """Have the ranks sampled as long as one lives."""
        self.is_sampling_over = False
        shipper = self.shipper
        if any(tracked.is_alive and not tracked.is_adopted for tracked in shipper.ranks):
            is_known = shipper.version >= SYSTEM_VERSION
            self.keeper.look(shipper.created_unix_ns if is_known else 0, now)

    def _end_sampling(self, now: int) -> bool:
        """Whether nobody samples any more, and what was written is known."""
        if not self.is_sampling_over and self.keeper.end(now):
            self.is_sampling_over = True
            self.shipper.abandon()  # also what another agent's sampler may hold that cannot die
        return self.is_sampling_over

    # -- the end

    def _is_over(self, now: int) -> bool:
        """Whether every rank and what launched them are gone, and how the ranks ended is known if it ever will be."""
        if any(tracked.is_alive for tracked in self.shipper.ranks) or self.shipper.may_learn(now):
            return False
        return self.launcher is None or has_ended(self.launcher)

    def _may_leave(self, now: int) -> bool:
        if self.over_since_ns is None:
            self.over_since_ns = now
        if self.shipper.has_rank_zero:
            if self.is_aggregator_done:
                return True
            if self.aggregator is None and self.shipper.is_idle and not self._has_other() and self.num_starts:
                return self._has_ended()
        elif self.shipper.is_idle and not self._has_other():  # as long as there is one, it may not have heard it yet
            return True
        return now - self.over_since_ns > _GIVE_UP_NS or not self.shipper.tracked

    def _has_ended(self) -> bool:
        return not (self.folder / "aggregator.json").exists()


def _pidfd(pid: int, ticks: int) -> int | None:
    """Open a process for watching; None if it has gone, and its pid is free or another's."""
    if pid <= 0:
        return None
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return None
    if ticks in (0, start_ticks(pid)):
        return descriptor
    os.close(descriptor)
    return None


def main() -> None:
    """Run the agent of the job folder in argv[1]."""
    folder = Path(sys.argv[1])
    killpoints.arm(os.environ)
    _detach()
    os.nice(10)  # the ranks come first; the aggregator and the forwarders inherit it
    logging.basicConfig(level=logging.INFO, format="%(asctime)s agent %(process)d %(levelname)s %(message)s")
    lock = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    os.truncate(folder / "spawn.lock", 0)  # should this agent die, the next one need not wait
    _clean_up(folder.parent)
    job = read_job(folder)
    agent = Agent(folder, job, take_up(folder.parent, folder, job))
    _logger.info("agent of run %s", agent.job.run_id)
    try:
        agent.run()
    except Exception:
        _logger.exception("the agent failed; the next log() starts another one")
        raise
    if agent.shipper.is_idle:
        for path in (folder, *agent.shipper.adopted):
            (path / DONE).touch()
    _logger.info("done: %r", agent.shipper)


def _clean_up(spool: Path) -> None:
    """Delete job folders whose records were all acknowledged an hour ago: their store may need them no longer. And the
    secrets of runs that have none left.
    """
    for marker in spool.glob(f"*/{DONE}"):
        try:
            if time.time() - marker.stat().st_mtime > KEEP_DONE_S:
                shutil.rmtree(marker.parent, ignore_errors=True)
        except FileNotFoundError:
            continue
    used = set()
    for path in spool.glob("*/job.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):  # not a job of this version, or gone by now
            used.add(secret_path(spool, read_job(path.parent).run_dir))
    for path in set(spool.glob("*.secret")) - used:
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > KEEP_DONE_S:
                path.unlink()


def _detach() -> None:
    """Leave the job's session and close every descriptor that came with it."""
    with suppress(PermissionError):  # the leader of a group already
        os.setsid()
    os.closerange(3, int(os.sysconf("SC_OPEN_MAX")) if os.sysconf("SC_OPEN_MAX") < 1 << 20 else 1 << 16)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)


if __name__ == "__main__":
    main()
