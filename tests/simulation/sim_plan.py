"""What the ranks of a simulated job log: the oracle. Every value is a function of (writer, seq), so that a value that
lands in the wrong place is as visible as one that is lost.
"""

import random
from dataclasses import dataclass, field

from ddplog.core.records import KIND_MESSAGE, KIND_SCHEMA, NO_STEP, encode_message, encode_scalars

MS = 1_000_000
SECOND = 1000 * MS
EPOCH = 77


@dataclass
class Logged:
    """One scalar record, as the oracle remembers it."""

    seq: int
    step: int
    weight: float
    values: dict[str, float]


@dataclass
class Journal:
    """A writer's journal: it survives crashes of the agent. What is below `oldest_seq` was trimmed."""

    number: int
    rank: int
    world_size: int
    life: int
    node: int
    born_ns: int
    frames: list[bytes] = field(default_factory=list)
    logged: list[Logged] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """The ambient step when frame i has been written."""
    due_ns: list[int] = field(default_factory=list)
    """When frame i is written."""
    ends_ns: int = 0
    has_finished: bool = False
    of: "Journal | None" = None
    """The rank's whose samples it holds; None: it is a rank's own."""
    schemas: dict[tuple[str, ...], int] = field(default_factory=dict)

    @property
    def incarnation(self) -> bytes:
        return self.number.to_bytes(2, "big") * 8

    def __post_init__(self):
        self.acked_seq = 0
        self.oldest_seq = 0
        self.visible = 0

    def _append(self, frame: bytes, at_ns: int, step: int) -> None:
        self.frames.append(frame)
        self.due_ns.append(at_ns)
        self.steps.append(step)

    def message(self, at_ns: int, step: int, **message) -> None:
        frame = encode_message(KIND_MESSAGE, len(self.frames), NO_STEP, at_ns, message, EPOCH)
        self._append(frame, at_ns, step)

    def text(self, at_ns: int, step: int) -> None:
        text = f"{self.number}:{len(self.frames)}"
        self.texts.append(text)
        self.message(at_ns, step, type="text", key="note", text=text)

    def log(self, at_ns: int, ambient: int, step: int, weight: float, keys: tuple[str, ...]) -> None:
        if keys not in self.schemas:
            self.schemas[keys] = len(self.schemas) + 1
            message = {"id": self.schemas[keys], "keys": keys}
            frame = encode_message(KIND_SCHEMA, len(self.frames), NO_STEP, at_ns, message, EPOCH)
            self._append(frame, at_ns, ambient)
        seq = len(self.frames)
        values = {key: value_of(self.number, seq, key) for key in keys}
        self.logged.append(Logged(seq, step, weight, values))
        frame = encode_scalars(self.schemas[keys], seq, step, at_ns, weight, list(values.values()), EPOCH)
        self._append(frame, at_ns, ambient)


def value_of(number: int, seq: int, key: str) -> float:
    """Return what writer `number` logs under `key` in its record `seq`: no two are equal."""
    return number * 10_000 + seq * 16 + ord(key[0]) % 16 + 0.125 * (seq % 7)


@dataclass
class Plan:
    """One job: its lives, one after the other, and how its keys are reduced."""

    journals: list[Journal]
    world_sizes: list[int]
    """Of each life."""
    reductions: dict[str, str]
    num_nodes: int
    over_ns: int
    """When the launcher goes."""


def make_plan(rng: random.Random, *, is_quiet: bool) -> Plan:
    """Draw a job: 1-2 nodes, 1-4 ranks, 1-3 lives, a few keys with their habits; `is_quiet`: without late values."""
    num_nodes = rng.choice((1, 1, 2))
    per_node = rng.choice((1, 2)) if num_nodes == 2 else rng.choice((1, 2, 3))
    num_lives = rng.choice((1, 1, 2, 2, 3))
    reductions = {"a": "mean", "b": rng.choice(("mean", "sum", "max", "min")), "c": "mean", "d": "mean"}
    defines = {key: name for key, name in reductions.items() if name != "mean"}
    journals: list[Journal] = []
    world_sizes = []
    now = 0
    first_step = 0
    for life in range(num_lives):
        if life and num_nodes == 1 and rng.random() < 0.2:
            per_node = rng.choice((1, 2, 3))
        world_size = num_nodes * per_node
        world_sizes.append(world_size)
        num_steps = rng.randint(3, 9)
        pace_ns = rng.choice((30, 80, 200)) * MS
        is_killed = life < num_lives - 1 or rng.random() < 0.2
        ends = []
        for rank in range(world_size):
            journal = Journal(
                len(journals) + 1, rank, world_size, life, rank // per_node, now + rng.randint(0, 50) * MS
            )
            _write(rng, journal, first_step, num_steps, pace_ns, defines, is_killed=is_killed, is_quiet=is_quiet)
            journals.append(journal)
            ends.append(journal.ends_ns)
        now = max(ends) + rng.randint(120, 600) * MS
        first_step = max(0, first_step + num_steps - rng.randint(0, 6))
    return Plan(journals, world_sizes, reductions, num_nodes, now)


def _write(rng, journal, first_step, num_steps, pace_ns, defines, *, is_killed, is_quiet):
    now = journal.born_ns
    for key, name in defines.items():
        journal.message(now, NO_STEP, type="define", pattern=key, reduce=name, replicated=False)
    skew = rng.choice((1.0, 1.0, 1.0, 2.5))
    repeats, strays, sparse = rng.random() < 0.3, rng.random() < 0.3, rng.random() < 0.4
    if is_quiet:
        repeats = strays = False
    ambient = NO_STEP
    sets_step = rng.random() < 0.5
    stops_at = rng.randint(1, num_steps) if is_killed else num_steps
    for step in range(first_step, first_step + stops_at):
        now += int(pace_ns * skew * rng.uniform(0.2, 1.8))
        if sets_step:
            ambient = step
        weight = rng.choice((1.0, 1.0, 2.0))
        journal.log(now, ambient, step, weight, ("a", "b"))
        if repeats and rng.random() < 0.4:
            journal.log(now, ambient, step, 1.0, ("a",))
        if journal.rank == 0 or (sparse and rng.random() < 0.3):
            journal.log(now, ambient, step, 1.0, ("c",))
        if strays and rng.random() < 0.4:
            journal.log(now, ambient, max(0, step - rng.randint(1, 5)), 1.0, ("d",) if rng.random() < 0.5 else ("a",))
        if rng.random() < 0.1:
            journal.text(now, ambient)
    now += rng.randint(0, 30) * MS
    if not is_killed:
        journal.message(now, ambient, type="finish", status="finished", detail="")
        journal.has_finished = True
    journal.ends_ns = now


def add_samplers(plan: Plan, rng: random.Random) -> None:
    """Let every rank be sampled: once in 200 ms, at seconds that have nothing to do with its steps. A sampler may be
    killed, and another one take its place; it may see its rank's end late.
    """
    plan.reductions["sys/u"] = plan.reductions["sys/host"] = "mean"
    for rank in list(plan.journals):
        now, is_over = rank.born_ns + rng.randint(20, 200) * MS, False
        while not is_over:
            sampler = Journal(len(plan.journals) + 1, rank.rank, rank.world_size, rank.life, rank.node, now, of=rank)
            plan.journals.append(sampler)
            killed_ns = now + rng.randint(50, 1500) * MS if rng.random() < 0.3 else None
            until_ns = rank.ends_ns + rng.choice((0, 5, 90)) * MS
            while now < until_ns and (killed_ns is None or now < killed_ns):
                second = now // (200 * MS) * 5
                if rank.rank == 0:
                    sampler.log(now, NO_STEP, second, 1.0, ("sys/host",))
                sampler.log(now, NO_STEP, second, 1.0, ("sys/u",))
                now += 200 * MS
            is_over = now >= until_ns
            sampler.has_finished = is_over
            if is_over:
                sampler.message(now, NO_STEP, type="finish", status="finished", detail="")
            sampler.ends_ns = now
            plan.over_ns = max(plan.over_ns, now)
            now += rng.randint(10, 150) * MS


def expected_points(plan: Plan) -> dict[tuple[int, str, int], tuple[float, int]]:
    """Return {(life, key, step): (value, n)} by brute force over everything that was logged."""
    cells: dict[tuple[int, str, int], dict[int, list[tuple[float, float]]]] = {}
    for journal in plan.journals:
        for record in journal.logged:
            for key, value in record.values.items():
                of_rank = cells.setdefault((journal.life, key, record.step), {})
                of_rank.setdefault(journal.rank, []).append((value, record.weight))
    result = {}
    for (life, key, step), of_rank in cells.items():
        reduce = plan.reductions[key]
        if reduce == "mean":
            pairs = [pair for rank in of_rank.values() for pair in rank]
            value = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
        else:
            fold = {"sum": sum, "max": max, "min": min}[reduce]
            value = fold(v for rank in of_rank.values() for v, _ in rank)
        result[life, key, step] = (value, len(of_rank))
    return result
