"""A forwarder around core.delivery, and the sink behind it: it takes a batch and times out, refuses, or is overrun."""

import random

from simulation.sim_edges import SimEmissions
from simulation.sim_plan import MS

from ddplog.core.delivery import Delivery, Idle, Limits, Send, Wait


class SinkWorker:
    """The forwarder's loop as events; its durable state is `ledger`, `dead`, and the sink itself."""

    def __init__(self, world):
        self.world = world
        self.rng = random.Random(world.seed ^ 0x5117)
        self.emissions = SimEmissions(world.database)
        self.ledger = 0
        self.dead = {}
        self.applied = []
        """Every emission id the sink took, as often as it took it."""
        self.rows = {}
        """What a sink that is keyed by id shows."""
        self.num_redone = 0
        """Emissions in batches that may have been taken before."""
        self.unanswered = None
        self.is_poisonous = self.rng.random() < 0.3
        self.trouble = self.rng.choice((0.0, 0.1, 0.4))
        self.crash = self.rng.choice((0.0, 0.05))
        self.limits = Limits(
            max_items=self.rng.choice((1, 4, 16)), rate_per_s=self.rng.choice((None, 200.0)), burst_items=8
        )
        self.start()

    def start(self):
        self.delivery = Delivery(self.ledger, None, self.limits)
        self.unanswered = None
        self.loop()

    @property
    def is_drained(self):
        return not self.emissions.page(self.ledger, 1)

    def is_poison(self, emission):
        return self.is_poisonous and emission.id % 13 == 5

    def loop(self):
        world, delivery = self.world, self.delivery
        if world.is_finished:
            return
        while True:
            action = delivery.next_action(world.now_ns)
            if isinstance(action, Wait):
                world.check(action.until_ns > world.now_ns, "a wait for the past")
                world.at(action.until_ns - world.now_ns, self.loop)
                return
            if isinstance(action, Idle):
                page = [] if not self._is_there() else self.emissions.page(delivery.last_id, 3 * self.limits.max_items)
                if not page:
                    world.at(300 * MS, self.loop)
                    return
                delivery.feed(page)
                continue
            if not self._send(action):
                world.at(self.rng.randint(1, 500) * MS, self.start)  # the forwarder crashed
                return

    def _is_there(self):
        return self.world.num_lives > 0

    def _send(self, action: Send) -> bool:
        world, rng, delivery, batch = self.world, self.rng, self.delivery, action.batch
        ids = [emission.id for emission in batch]
        world.check(ids == sorted(set(ids)), "a batch out of order")
        world.check(ids[0] > self.ledger, "a batch from below the cursor")
        if self.unanswered is not None:
            world.check(ids == self.unanswered, f"{self.unanswered} was unanswered, and is sent again as {ids}")
        self.unanswered = ids
        luck = 1.0 if world.is_calm else rng.random()
        if luck < self.crash / 2:
            return False
        if luck < self.trouble:
            kind = rng.choice(("taken", "not taken", "429"))
            if kind == "taken" and not any(map(self.is_poison, batch)):
                self._take(batch)
                self.num_redone += len(batch)
            delivery.failed_retryable(world.now_ns, rng.random(), rng.choice((None, 2.0)) if kind == "429" else None)
            return True
        if any(map(self.is_poison, batch)):
            dead = delivery.failed_permanent("poison")
            self.unanswered = None
            if dead is not None:
                world.check(self.is_poison(dead.emission), f"{dead.emission} is dead, and is no poison")
                self.dead[dead.emission.id] = dead.emission
                self.ledger = delivery.cursor
            return True
        self._take(batch)
        if luck < self.trouble + self.crash / 2:
            self.num_redone += len(batch)
            return False
        delivery.succeeded(None)
        self.unanswered = None
        self.ledger = delivery.cursor
        return True

    def _take(self, batch):
        for emission in batch:
            self.applied.append(emission.id)
            known = self.rows.setdefault(emission.id, emission)
            self.world.check(known == emission, f"{known} was sent again as {emission}")

    def check_end(self):
        """At least once, in order, nothing lost silently; what came twice is accounted for."""
        world = self.world
        every = self.emissions.page(0, 1 << 20)
        for emission in every:
            taken = emission.id in self.rows
            world.check(taken != (emission.id in self.dead), f"{emission} is not at the sink")
            world.check(taken != self.is_poison(emission), f"{emission} has the wrong end")
        first = list(dict.fromkeys(self.applied))
        world.check(first == sorted(first), "emissions came out of order")
        doubled = len(self.applied) - len(first)
        world.check(doubled <= self.num_redone, f"{doubled} doubled, {self.num_redone} were sent again")
        known = {emission.id for emission in every}
        world.check(known >= set(self.rows), "the sink has what is not in the store")
