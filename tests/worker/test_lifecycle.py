"""init() and what surrounds a run in a process: what is refused before training starts, and how a process ends."""

import ast
import sys

import pytest
from system.jobs import Job, wait_until

import ddplog
from ddplog.core.records import KIND_MESSAGE, decode, scan_payload
from ddplog.errors import ConfigError, UsageError
from ddplog.journal.reader import JournalReader
from ddplog.worker import current
from ddplog.worker.absent import NullRun


@pytest.fixture
def quiet(tmp_path, monkeypatch):
    """A process that is no rank, in an empty folder, with no current run."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DDPLOG_JOB"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(current, "run", None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPLOG_SPOOL", str(tmp_path / "s"))
    return tmp_path


@pytest.fixture
def job(tmp_path):
    job = Job(tmp_path)
    yield job
    job.close()


# -- before the first step


def refused(**arguments):
    with pytest.raises(ConfigError) as caught:
        ddplog.init(**arguments)
    assert current.run is None
    return caught.value.setting


def test_a_run_that_is_off_makes_no_file(quiet):
    run = ddplog.init(mode="off", sinks=["no-such-sink"], dir="/proc/nowhere")

    assert isinstance(run, NullRun)
    assert current.run is run
    ddplog.log({"x": 1.0})
    ddplog.finish()
    assert list(quiet.iterdir()) == []


def test_a_setting_that_cannot_work_is_refused_before_anything_is_made(quiet):
    assert refused(projet="x") == "projet"
    assert refused(resume="perhaps") == "resume"
    assert refused(sinks=["no-such-sink"]) == "sinks"
    assert list(quiet.iterdir()) == []


def test_a_folder_of_runs_that_is_none_is_refused(quiet):
    (quiet / "file").touch()

    assert refused(dir=quiet / "file") == "dir"
    assert refused(dir=quiet / "file" / "below") == "dir"


def test_a_spool_that_others_may_enter_is_refused(quiet):
    (quiet / "s").mkdir()
    (quiet / "s").chmod(0o755)

    assert refused() == "spool"


def test_a_run_that_must_be_there_or_must_not_is_looked_for(quiet):
    (quiet / "runs" / "old").mkdir(parents=True)
    (quiet / "runs" / "old" / "run.db").touch()

    assert refused(run_id="old", resume="never") == "resume"
    assert refused(run_id="new", resume="must") == "resume"
    assert not list((quiet / "s").glob("*/job.json"))


def test_a_rank_outside_its_world_is_refused(quiet, monkeypatch):
    for name, value in {"RANK": "4", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)

    assert refused() == "RANK"


def test_before_init_every_call_says_what_to_do(quiet):
    for call in (
        lambda: ddplog.log({"x": 1.0}), lambda: ddplog.define_metric("x"), lambda: ddplog.log_params({}),
        lambda: ddplog.log_text("a", "b"), lambda: ddplog.alert("a"), lambda: ddplog.set_step(1), ddplog.flush,
    ):  # fmt: skip
        with pytest.raises(UsageError, match="init"):
            call()
    ddplog.finish()  # nothing to finish is no mistake


# -- how a process ends

START = "import ddplog, os, sys\nrun = ddplog.init(exit_wait_s=0)\nrun.log({'x': 1.0}, step=0)\n"


def last_words(job):
    """The finish messages of the job's journals, in the order of their ranks and incarnations' starts."""
    readers = [JournalReader(path.parent) for path in job.spool.glob("*/*/head")]
    words = []
    for reader in sorted(readers, key=lambda reader: reader.identity["started_unix_ns"]):
        said = None
        while (chunk := reader.read(1 << 20)) is not None:
            for offset, _ in scan_payload(chunk.payload):
                record = decode(chunk.payload, offset)
                if record.kind == KIND_MESSAGE and record.message["type"] == "finish":
                    said = (record.message["status"], record.message["detail"])
        words.append(said)
        reader.close()
    return words


@pytest.mark.system
@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("", 0, [("finished", "")]),
        ("sys.exit(0)", 0, [("finished", "")]),
        ("raise ValueError('loss is nan\\nmore')", 1, [("failed", "ValueError: loss is nan")]),
        ("raise KeyboardInterrupt", -2, [("killed", "KeyboardInterrupt")]),
        ("run.finish('preempted', 'SIGTERM')\nraise ValueError", 1, [("preempted", "SIGTERM")]),
        ("os._exit(7)", 7, [None]),
        (
            "second = ddplog.init(run_id='r2', exit_wait_s=0)\nraise ValueError('x')",
            1,
            [("failed", "ValueError: x")] * 2,
        ),
        (
            "if os.fork() == 0:\n    sys.exit(3)\nassert os.waitstatus_to_exitcode(os.wait()[1]) == 3",
            0,
            [("finished", "")],
        ),
        ("ddplog.finish('failed', 'says the script')", 0, [("failed", "says the script")]),
    ],
    ids=["end", "exit0", "exception", "interrupt", "own word", "os._exit", "two runs", "fork", "module function"],
)
def test_a_rank_says_how_it_ended_and_its_exit_code_stays(job, ending, code, words):
    job.run(sys.executable, job.script(START + ending), code=code)

    assert last_words(job) == words


@pytest.mark.system
def test_the_users_excepthook_still_runs(job):
    hook = "sys.excepthook = lambda kind, error, traceback: print('mine', kind.__name__)\n"
    out, _ = job.run(sys.executable, job.script("import sys\n" + hook + START + "raise ValueError('x')"), code=1)

    assert out == "mine ValueError\n"
    assert last_words(job) == [("failed", "ValueError: x")]


@pytest.mark.system
def test_ranks_of_one_job_get_one_run_and_a_later_job_another(job):
    """No run_id is given: the first rank made one up, and the second job is a second run."""
    script = job.script(
        "import ddplog, os\nrun = ddplog.init(exit_wait_s=0)\nos.write(1, f'{run.run_id} {run.rank} {run.world_size}\\n'.encode())"
    )
    words = [sorted(job.run(*job.ranks(2, script), DDPLOG_RUN_ID=None)[0].split("\n")[:2]) for _ in range(2)]
    ids = [{line.split()[0] for line in lines} for lines in words]

    assert [[line.split()[1:] for line in sorted(lines, key=lambda text: text.split()[1])] for lines in words] == [
        [["0", "2"], ["1", "2"]]
    ] * 2
    assert [len(found) for found in ids] == [1, 1]
    assert ids[0] != ids[1]


@pytest.mark.system
def test_the_journals_head_says_whose_it_is(job):
    script = job.script(START + "print({'pid': os.getpid(), 'host': os.uname().nodename})")
    out, _ = job.run(sys.executable, script)
    wait_until(lambda: list(job.spool.glob("*/*/head")))
    (path,) = job.spool.glob("*/*/head")
    reader = JournalReader(path.parent)
    expected = ast.literal_eval(out) | {
        "rank": 0,
        "world_size": 1,
        "local_rank": 0,
        "launcher": "python",
        "run_id": "r1",
    }

    assert {name: reader.identity[name] for name in expected} == expected
    assert path.parent.name == f"0.{reader.incarnation.hex()}"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    reader.close()
