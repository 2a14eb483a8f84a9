"""Ranks whose records go through a real pipeline, for tests of what the store makes of its effects."""

from dataclasses import replace

from ddplog.core.attempt import Options
from ddplog.core.effects import SYSTEM, WriterInfo
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import KIND_MESSAGE, KIND_SCHEMA, NO_STEP, encode_message, encode_scalars

OPTIONS = Options(grace_ns=10_000, late_ns=500, settle_ns=100, max_keys=100)
TIME_NS = 1_700_000_000_000_000_000


class Rank:
    """One writer's records."""

    def __init__(self, rank, world=1, life=0):
        self.incarnation = bytes([rank, life]) + bytes(14)
        self.rank, self.world, self.life = rank, world, life
        self.records = []
        self.schemas = {}

    @property
    def info(self):
        return WriterInfo(
            incarnation=self.incarnation, rank=self.rank, world_size=self.world, local_rank=self.rank, node_rank=0,
            node_id="0", host="h", pid=100 + self.rank, boot_id="b", started_unix_ns=self.life, is_alive=True,
        )  # fmt: skip

    def log(self, step, weight=1.0, **values):
        keys = tuple(values)
        if keys not in self.schemas:
            self.schemas[keys] = len(self.schemas) + 1
            message = {"id": self.schemas[keys], "keys": keys}
            self.records.append(encode_message(KIND_SCHEMA, len(self.records), NO_STEP, TIME_NS, message, 0))
        values = [float(value) for value in values.values()]
        record = encode_scalars(self.schemas[keys], len(self.records), step, TIME_NS + step, weight, values, 0)
        self.records.append(record)
        return self

    def say(self, step=NO_STEP, **message):
        self.records.append(encode_message(KIND_MESSAGE, len(self.records), step, TIME_NS, message, 0))
        return self


class Sampler(Rank):
    """What a sampler wrote about a rank."""

    def __init__(self, rank):
        super().__init__(rank.rank, rank.world)
        self.incarnation = bytes([200, rank.rank, rank.life]) + bytes(13)
        self.of = rank

    @property
    def info(self):
        return replace(super().info, role=SYSTEM, belongs_to=self.of.incarnation, pid=99)


class Feed:
    """A pipeline, and a clock that moves when told."""

    def __init__(self, *ranks, restored=None):
        self.pipeline = Pipeline(OPTIONS, restored)
        self.now = 0
        self.declare(*ranks)

    def declare(self, *ranks):
        self.pipeline.hello([rank.info for rank in ranks], self.now, TIME_NS)

    def send(self, *ranks):
        """Send what is new of each."""
        for rank in ranks:
            first, last = self.pipeline.writers[rank.incarnation].next_seq, len(rank.records)
            if first < last:
                payload = b"".join(rank.records[first:last])
                self.pipeline.batch(rank.incarnation, first, last - first, payload, self.now, TIME_NS)

    def end(self, *ranks):
        self.send(*ranks)
        for rank in ranks:
            self.pipeline.bye(rank.incarnation, len(rank.records), self.now, TIME_NS)

    def effects(self, ns=200, store=None):
        """Let time pass, and return what is to be made durable; with a store, stale points are derived from it."""
        self.pipeline.tick(self.now, TIME_NS)
        self.now += ns
        self.pipeline.tick(self.now, TIME_NS)
        effects = self.pipeline.take()
        if store is not None:
            for stale in self.pipeline.take_stale(self.now, at_once=True):
                entries = [row[1:] for row in store.entries()]
                entries += [(e.writer_id, e.first_seq, e.payload) for e in effects.log]
                emission = self.pipeline.derive(stale, entries)
                if emission is not None:
                    effects.emissions.append((stale.attempt, emission))
        return effects
