"""An experiment on a real journal, and what that journal then holds."""

import pytest

from ddplog.comet import current as current_experiment
from ddplog.comet.experiment import Experiment
from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, KIND_SCHEMA, NO_STEP, decode, scan_payload
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import JournalWriter
from ddplog.worker import current
from ddplog.worker.identity import Identity
from ddplog.worker.run import Run

JOB = JobInfo(
    run_id="r1", project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=0, launcher_pid=0,
    launcher="python", node_rank=0, settings={},
)  # fmt: skip
WHO = Identity(rank=2, world_size=4, local_rank=0, local_world_size=1, node_rank=0, launcher="env")


class Logged:
    """What one experiment has logged."""

    def __init__(self, run):
        self.run = run

    def _records(self):
        reader = JournalReader(self.run._journal.folder)
        while (chunk := reader.read(1 << 20)) is not None:
            yield from (decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload))
        reader.close()

    @property
    def metrics(self):
        """(step, {name: value}) of each call."""
        schemas, found = {}, []
        for record in self._records():
            if record.kind == KIND_SCHEMA:
                schemas[record.message["id"]] = record.message["keys"]
            elif record.kind == KIND_SCALARS:
                found.append((record.step, dict(zip(schemas[record.schema_id], record.values, strict=True))))
        return found

    def messages(self, kind):
        return [r for r in self._records() if r.kind == KIND_MESSAGE and r.message["type"] == kind]

    @property
    def params(self):
        return {k: v for record in self.messages("params") for k, v in record.message["values"].items()}

    @property
    def texts(self):
        return [
            (None if r.step == NO_STEP else r.step, r.message["key"], r.message["text"]) for r in self.messages("text")
        ]


@pytest.fixture(autouse=True)
def no_comet(tmp_path, monkeypatch):
    """No run, no experiment and no setting of Comet's or ours."""
    for name in ("COMET_API_KEY", "COMET_PROJECT_NAME", "COMET_EXPERIMENT_KEY", "COMET_AUTO_LOG_DISABLE",
                 "DDPLOG_PROJECT", "DDPLOG_RUN_ID"):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(current, "run", None)
    monkeypatch.setattr(current_experiment, "experiment", None)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The current run, as if ddplog.init() had made it on rank 2 of 4."""
    for name, value in {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    journal = JournalWriter(
        tmp_path / "2.0", b"i" * 16, {"rank": 2}, segment_bytes=1 << 20, spool_bytes=1 << 30, check=lambda: None
    )
    run = Run(journal, JOB, WHO, strict=False, exit_wait_s=0.0, max_keys=10_000)
    monkeypatch.setattr(current, "run", run)
    yield run
    journal.close(finished=False)


@pytest.fixture
def experiment(run):
    return Experiment("a-key-of-somebody", "some project", "workspace")


@pytest.fixture
def logged(experiment):
    return Logged(experiment.run)
