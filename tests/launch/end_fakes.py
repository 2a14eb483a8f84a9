"""Fakes for the end of a job: a clock that only waiting moves, an aggregator, and a job's folder."""

import json

from ddplog.errors import ControlUnavailableError
from ddplog.journal.spool import JobInfo, declare_job
from ddplog.launch.drain import Patience
from ddplog.v1.control_pb2 import FinishReply, SinkStatus, StatusReply


class FakePatience(Patience):
    """Time passes only by waiting; `at` runs an action at a time."""

    def __init__(self):
        super().__init__()
        self.clock_s = 0.0
        self.plans = []

    def now_s(self):
        return self.clock_s

    def at(self, clock_s, action):
        self.plans.append((clock_s, action))

    def wait(self, seconds):
        self.clock_s += seconds
        for plan in [plan for plan in self.plans if plan[0] <= self.clock_s]:
            self.plans.remove(plan)
            plan[1]()


class FakeAggregator:
    """Counts as reachable while its socket is written; drains when told to."""

    def __init__(self, run_dir, sinks=()):
        self.run_dir = run_dir
        self.requests = []
        self.is_up = True
        self.is_drained = True
        self.status = "running"
        self.sinks = [SinkStatus(name=name, state="running", lag=3) for name in sinks]
        self.num_open = 0
        run_dir.mkdir(parents=True, exist_ok=True)
        self.write_control()

    def write_control(self):
        (self.run_dir / "control.json").write_text(json.dumps({"socket": "/c.sock", "pid": 1}))

    def drain(self):
        for sink in self.sinks:
            sink.state, sink.lag = "drained", 0

    def leave(self):
        """End as an aggregator does that has delivered everything."""
        self.is_up = False
        (self.run_dir / "control.json").unlink()

    def connect(self, path):
        if not self.is_up:
            raise ControlUnavailableError(f"{path}: nobody")
        self.num_open += 1
        return FakeClient(self)


class FakeClient:
    def __init__(self, aggregator):
        self.aggregator = aggregator

    def _check(self):
        if not self.aggregator.is_up:
            raise ControlUnavailableError("gone")

    def status(self):
        self._check()
        a = self.aggregator
        return StatusReply(status=a.status, is_drained=a.is_drained, sinks=a.sinks)

    def finish(self, request):
        self._check()
        self.aggregator.requests.append(request)
        self.aggregator.status = request.status
        return FinishReply(status=request.status)

    def close(self):
        self.aggregator.num_open -= 1


def make_job(spool, runs, job="0123456789abcdef", run_id="r1", sinks=(), *, has_rank_zero=True):
    """Declare a run as a rank would; returns the job's folder."""
    spool.mkdir(mode=0o700, exist_ok=True)
    folder = spool / f"{job}-{run_id}"
    declare_job(
        folder,
        JobInfo(
            run_id=run_id,
            project="p",
            name=None,
            dir=str(runs),
            sinks=tuple(sinks),
            tags=(),
            config={},
            created_unix_ns=1,
            launcher_pid=1,
            launcher="ddplog run",
            node_rank=0,
            settings={},
        ),
    )
    if has_rank_zero:
        (folder / "0.abc").mkdir()
    return folder


def write_sink(run_dir, name, state, lag=0, detail=""):
    """Leave a forwarder's state."""
    folder = run_dir / "sinks" / name
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"name": name, "state": state, "lag": lag, "detail": detail}))
