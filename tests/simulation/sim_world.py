"""A whole job in one thread with one seed: agents and their Shippers, the real Aggregator.run(), its store's SQL, one
sink, and between them a network and processes that fail. The aggregator's poll() runs the other events, in simulated
time. Reliability cases 4, 8, 9, 11, 12: partitions, clogs, stalls, answers that get lost.
"""

import errno
import heapq
import random
import sqlite3
from dataclasses import dataclass

from simulation.sim_check import check_end, check_store
from simulation.sim_edges import Crash, JobFolder, Now, SimDatabase, SimPath, edges, stored_meta
from simulation.sim_plan import MS, SECOND, Plan, add_samplers, make_plan
from simulation.sim_sink import SinkWorker

from ddplog.agent.shipper import Shipper
from ddplog.aggregator.process import Aggregator
from ddplog.journal.spool import JobInfo
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec
from ddplog.wire.sockets import Received

LIMIT_NS = 90 * SECOND
"""Everything has drained this long after the last fault, of simulated time."""


class ViolationError(AssertionError):
    """An invariant does not hold."""


class SimJob(JobInfo):
    """A job whose run's folder is not on any disk."""

    @property
    def run_dir(self):
        return SimPath("run")


@dataclass
class Faults:
    """How bad this world is."""

    drop: float
    duplicate: float
    reorder: float
    crash_every: int
    """Mean number of crash points passed by the aggregator between crashes; 0: none."""
    num_crashes: int
    queue_full: float
    stall: float

    @classmethod
    def draw(cls, rng: random.Random) -> "Faults":
        if rng.random() < 0.1:
            return cls(0, 0, 0, 0, 0, 0, 0)
        return cls(
            drop=rng.choice((0, 0, 0.05, 0.15, 0.3)),
            duplicate=rng.choice((0, 0, 0.1, 0.3)),
            reorder=rng.choice((0, 0, 0.1, 0.4)),
            crash_every=rng.choice((0, 30, 80, 200)),
            num_crashes=rng.randint(1, 5),
            queue_full=rng.choice((0, 0, 0.05)),
            stall=rng.choice((0, 0, 0.02)),
        )


class Agent:
    """As agent.process.Agent, without its process."""

    def __init__(self, world: "World", node: int) -> None:
        self.world, self.node = world, node
        self.inbox: list[bytes] = []
        self.is_down = False
        self.shipper: Shipper
        self.start()

    def start(self):
        self.is_down = False
        keep = 0 if self.world.is_trimming else 1 << 30
        self.shipper = Shipper(JobFolder(self.world, self.node), "r", str(self.node), keep)
        self.life = -1
        self.loop()

    def crash(self):
        self.is_down = True
        self.inbox.clear()
        self.world.at(self.world.rng.randint(10, 800) * MS, self.start)

    def rejoin(self):
        self.life = -1

    def is_over(self):
        if any(tracked.is_alive for tracked in self.shipper.tracked.values()):
            return False
        return self.world.now_ns > self.world.plan.over_ns

    def loop(self):
        if self.is_down or self.world.is_finished:
            return
        world, shipper = self.world, self.shipper
        now = world.now_ns
        shipper.discover()
        shipper.check_deaths(now)
        inbox, self.inbox = self.inbox, []
        for data in inbox:
            shipper.receive(data, now)
        if world.endpoint:
            if self.life != world.endpoint:
                self.life = world.endpoint
                shipper.joined()
            for data in shipper.outgoing(now):
                if not world.is_calm and world.rng.random() < world.faults.queue_full:
                    shipper.joined()
                    break
                world.to_aggregator(self.node, data)
            beat = shipper.heartbeat(now, is_over=self.is_over())
            if beat is not None:
                world.to_aggregator(self.node, beat)
                for data in shipper.byes():
                    world.to_aggregator(self.node, data)
        shipper.keep_durable(now)
        world.at(5 * MS if shipper.has_more else world.rng.randint(40, 80) * MS, self.loop)


class World:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.is_quiet = seed % 8 == 7
        """Nothing fails, so that no point may need a second revision."""
        self.rng = random.Random(seed)
        rng = self.rng
        self.plan: Plan = make_plan(rng, is_quiet=self.is_quiet)
        if seed % 6 == 1:
            add_samplers(self.plan, random.Random(seed))
        self.faults = Faults.draw(rng) if not self.is_quiet else Faults(0, 0, 0, 0, 0, 0, 0)
        self.is_trimming = rng.random() < 0.3
        self.now_ns = 1
        self._events = []
        self._num_events = 0
        self._inbox = []
        self.endpoint = 0
        self.num_lives = 0
        self.rank_log = []
        self.num_synced = 0
        self.is_crashing = False
        self.is_finished = False
        self.calm_ns = self.plan.over_ns + rng.randint(0, 1000) * MS
        self.database = sqlite3.connect(":memory:", isolation_level=None, factory=SimDatabase)
        self._stops_ns = random.Random(seed).randint(1, self.plan.over_ns) if seed % 16 == 7 else 0
        self._fuse = self._draw_fuse()
        self._num_crashes = 0
        self.trace = None
        span = self.calm_ns
        nodes = range(self.plan.num_nodes)
        self._cuts = [self._span(node, span) for node in nodes if rng.random() < 0.25]
        self._clogs = [self._span(node, span) for node in nodes if rng.random() < 0.25]
        self._full = [self._span(0, span)] if rng.random() < 0.1 else []
        if self.is_quiet:
            self._cuts, self._clogs, self._full = [], [], []
        settings = {
            "grace_s": 30.0 if self.is_quiet else rng.choice((0.3, 1.0, 5.0)), "late_s": rng.choice((0.1, 0.4)),
            "settle_s": rng.choice((0.0, 0.05)), "max_keys": 100, "host": "", "port": 0, "rank_log_bytes": 1 << 30,
        }  # fmt: skip
        self.job = SimJob(
            run_id="r", project="p", name=None, dir="d", sinks=(), tags=(), config={}, created_unix_ns=1,
            launcher_pid=0, launcher="torchrun", node_rank=0, settings=settings,
        )  # fmt: skip

    def _span(self, node, span):
        start = self.rng.randint(0, span)
        return node, start, start + self.rng.randint(50, 2500) * MS

    def _draw_fuse(self):
        every = self.faults.crash_every
        return self.rng.randint(1, 2 * every) if every else -1

    # -- time

    def at(self, delay_ns, call):
        self._num_events += 1
        heapq.heappush(self._events, (self.now_ns + delay_ns, self._num_events, call))

    def advance(self, until_ns, *, wake=False):
        """Run events up to a time; `wake`: or until the aggregator has a message."""
        while self._events and self._events[0][0] <= until_ns and not (wake and self._inbox):
            self.now_ns, _, call = heapq.heappop(self._events)
            call()
        if not (wake and self._inbox):
            self.now_ns = until_ns
        if (
            self.now_ns
            > max(self.calm_ns, *(end for _, _, end in [*self._cuts, *self._clogs, *self._full, (0, 0, 0)])) + LIMIT_NS
        ):
            raise ViolationError(f"seed {self.seed}: stuck: {[a.shipper for a in self.agents]}, {self.sink.delivery}")

    def sleep(self, nanoseconds):
        self.advance(self.now_ns + nanoseconds)

    @property
    def is_calm(self):
        return self.now_ns >= self.calm_ns

    # -- network

    def to_aggregator(self, node, data):
        life = self.endpoint

        def deliver():
            if self.endpoint == life:
                self._inbox.append(Received(bytes([node]), str(node), data))

        self._send(node, deliver)

    def answer(self, routing_id, data):
        message = codec.decode(data)
        if isinstance(message, pb.Ack | pb.Welcome):
            for cursor in message.cursors:
                self.check_acked(cursor.incarnation, cursor.next_seq)
        life, agent = self.endpoint, self.agents[routing_id[0]]

        def deliver():
            if agent.life == life and not agent.is_down:
                agent.inbox.append(data)

        self._send(agent.node, deliver)

    def _send(self, node, deliver):
        rng, faults, now = self.rng, self.faults, self.now_ns
        if any(cut == node and start <= now < end for cut, start, end in self._cuts):
            return
        delay = 2 * MS
        for clogged, start, end in self._clogs:
            if clogged == node and start <= now < end:
                delay = end - now
        if not self.is_calm:
            if rng.random() < faults.drop:
                return
            if rng.random() < faults.duplicate:
                self.at(delay + rng.randint(0, 400) * MS, deliver)
            if rng.random() < faults.reorder:
                delay += rng.randint(0, 300) * MS
        self.at(delay, deliver)

    # -- what the aggregator's surroundings ask

    def born(self, node):
        return [j for j in self.plan.journals if j.node == node and j.born_ns <= self.now_ns]

    def listen(self):
        self.num_lives += 1
        self.endpoint = self.num_lives
        self._inbox.clear()

    def poll(self, timeout_ms):
        self.may_crash("between messages")
        if not self.is_calm and self.faults.stall and self.rng.random() < self.faults.stall:
            self.sleep(self.rng.randint(50, 1500) * MS)
        if self._stops_ns and self.now_ns >= self._stops_ns:
            self._stops_ns = 0
            self.sleep(40 * SECOND)
            return []  # SIGCONT: its I/O thread has not read anything yet, and nobody was silent
        self.advance(self.now_ns + timeout_ms * MS, wake=True)
        count = self.rng.randint(1, len(self._inbox)) if self._inbox else 0
        taken, self._inbox = self._inbox[:count], self._inbox[count:]
        return taken

    def may_crash(self, where):
        self._fuse -= 1
        if self._fuse or self.is_calm or self._num_crashes >= self.faults.num_crashes:
            return
        self._num_crashes += 1
        self.is_crashing = True
        raise Crash(where)

    def may_fail_to_write(self):
        for _, start, end in self._full:
            if start <= self.now_ns < end:
                raise OSError(errno.ENOSPC, "no space left")

    # -- invariants

    def check(self, holds, message):
        if not holds:
            raise ViolationError(f"seed {self.seed}, at {self.now_ns / 1e9:.3f} s: {message}")

    def stored_seq(self, incarnation):
        sql = "SELECT next_seq FROM writers WHERE incarnation = ?"
        row = sqlite3.Connection.execute(self.database, sql, (incarnation,)).fetchone()
        return row[0] if row else 0

    def check_acked(self, incarnation, next_seq):
        """Acked is a subset of the store."""
        stored = self.stored_seq(incarnation)
        self.check(next_seq <= stored, f"seqs below {next_seq} were acknowledged, below {stored} are stored")
        self.check(not self.database.in_transaction, "an answer amid a transaction")

    # -- the run

    def run(self):
        rng = self.rng
        Now.world = self
        self.agents: list[Agent] = []
        self.sink = SinkWorker(self)
        self.agents += [Agent(self, node) for node in range(self.plan.num_nodes)]
        for agent in self.agents if not self.is_quiet else ():
            if rng.random() < 0.2:
                self.at(rng.randint(0, self.calm_ns), agent.crash)
            if rng.random() < 0.2:
                self.at(rng.randint(0, self.calm_ns), agent.rejoin)
        self.advance(rng.randint(1, 300) * MS)
        while True:
            pauses = (1, 20, 100, 800) if self._live() else (100, 500)
            self.endpoint = 0
            check_store(self)
            if self._is_over():
                break
            self.advance(self.now_ns + rng.choice(pauses) * MS)
            while not self._is_over() and self._is_at_rest():
                self.advance(self.now_ns + 100 * MS)
            if self._is_over():
                break
        while not self.sink.is_drained:
            self.advance(self.now_ns + 500 * MS)
        self.is_finished = True
        check_end(self)

    def _live(self) -> bool:
        """One life of the aggregator. Return whether it crashed."""
        is_crashed = True
        try:
            Aggregator(SimPath("job"), self.job).run()
            is_crashed = False
            for agent in self.agents:
                if not agent.is_down and agent.shipper.has_rank_zero:
                    agent.shipper.settle()
        except (Crash, OSError, sqlite3.Error):  # the last two: it cannot start while the disk is full
            if self.database.in_transaction:
                self.database.rollback()
            lost = len(self.rank_log) - self.num_synced
            if lost > 0:
                del self.rank_log[len(self.rank_log) - self.rng.randint(0, lost) :]
            self.is_crashing = False
            self._fuse = self._draw_fuse()
        self.num_synced = min(self.num_synced, len(self.rank_log))
        return is_crashed

    def _is_at_rest(self):
        """The run has ended, and no agent has anything that would start another aggregator."""
        status = stored_meta(self.database, "status") or {"status": "running"}
        return status["status"] != "running" and all(a.shipper.is_idle or not a.shipper.tracked for a in self.agents)

    def _is_over(self):
        everyone = all(len(a.shipper.tracked) == len(self.born(a.node)) for a in self.agents)
        return self.now_ns > self.plan.over_ns and everyone and self._is_at_rest()


def simulate(seed: int) -> World:
    """Run one seed.

    Raises:
        ViolationError: An invariant does not hold.
    """
    world = World(seed)
    with edges():
        try:
            world.run()
        except ViolationError:
            raise
        except Exception as exc:
            raise ViolationError(f"seed {seed}: {exc!r}") from exc
        finally:
            sqlite3.Connection.close(world.database)
            Now.world = None
    return world
