"""torchrun in this process: its behaviour, and what it knows about each rank."""

import argparse
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from ddplog.errors import ConfigError, DdplogError
from ddplog.launch import torchrun

DRIVER = """
import os, sys
from ddplog.launch import torchrun
arguments = torchrun.make_parser().parse_args(sys.argv[1:])
outcome = torchrun.run_torchrun(arguments, os.environ)
print("outcome:", outcome.status, outcome.detail, sep="|")
for failure in outcome.failures:
    print("rank:", failure.rank, failure.exit_code, failure.pid > 0, sep="|")
sys.exit(outcome.exit_code)
"""


def arguments(script, **options):
    return argparse.Namespace(
        **{"training_script": script, "module": False, "no_python": False, "run_path": False, **options}
    )


def start(folder, code, *options):
    """Start a torchrun job of two ranks whose script is `code`. It writes lines with os.write: print() may split them."""
    script = folder / "script.py"
    script.write_text(code)
    environ = {k: v for k, v in os.environ.items() if k not in ("SLURM_JOB_ID", "KUBERNETES_SERVICE_HOST")}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, "--nproc-per-node", "2", *options, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environ, "OMP_NUM_THREADS": "1"},
        cwd=folder,
    )


def test_without_torch_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(torchrun, "is_installed", lambda: False)
    with pytest.raises(DdplogError, match=r"pip install torch.*ddplog run -- COMMAND"):
        torchrun.make_parser()


def test_a_script_that_is_not_there_is_found_out_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        torchrun.check_script(arguments(str(tmp_path / "train.py")))
    (tmp_path / "train.py").touch()
    torchrun.check_script(arguments(str(tmp_path / "train.py")))


def test_a_program_in_the_scripts_place_gets_a_hint():
    with pytest.raises(ConfigError, match="ddplog run -- sh"):
        torchrun.check_script(arguments("sh"))


def test_modules_and_programs_are_looked_for_elsewhere():
    torchrun.check_script(arguments("no.such.module", module=True))
    torchrun.check_script(arguments("sh", no_python=True))
    with pytest.raises(ConfigError, match="no such program"):
        torchrun.check_script(arguments("ddplog-no-such-program", no_python=True))


def test_torchs_failures_are_translated():
    recorded = {"message": "ValueError: bad\nmore", "extraInfo": {}}
    failures = torchrun._read_failures(
        {
            3: SimpleNamespace(pid=33, exitcode=-15, timestamp=12, message="Signal 15 (SIGTERM) received by PID 33"),
            1: SimpleNamespace(pid=31, exitcode=1, timestamp=11, message=recorded),
        }
    )
    assert [(f.rank, f.pid, f.exit_code, f.timestamp_s, f.message) for f in failures] == [
        (1, 31, 1, 11.0, "ValueError: bad"),
        (3, 33, -15, 12.0, ""),
    ]


def test_long_messages_are_cut():
    assert len(torchrun._first_line("x" * 1000)) == 200


@pytest.mark.system
def test_a_failing_rank_is_named_and_torchruns_table_is_printed(tmp_path):
    code = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(60)\n"
    out, err = start(tmp_path, code).communicate(timeout=100)
    assert "outcome:|failed|rank 1: exit code 7" in out
    assert "rank:|1|7|True" in out
    assert "rank:|0|-15|True" in out
    assert "ChildFailedError" in err
    assert "Root Cause (first observed failure)" in err


@pytest.mark.system
def test_a_killed_rank_is_named_with_its_signal(tmp_path):
    code = "import os, time\nif os.environ['RANK'] == '1': os.kill(os.getpid(), 9)\ntime.sleep(60)\n"
    process = start(tmp_path, code)
    out, _ = process.communicate(timeout=100)
    assert "outcome:|failed|rank 1: signal 9 (SIGKILL)" in out
    assert process.returncode == 1


@pytest.mark.system
def test_sigterm_to_the_launcher_stops_the_ranks_and_exits_like_torchrun(tmp_path):
    code = "import os, time\nos.write(1, b'up %s\\n' % os.environb[b'RANK'])\ntime.sleep(60)\n"
    process = start(tmp_path, code)
    with process:
        seen = {process.stdout.readline(), process.stdout.readline()}
        assert seen == {"up 0\n", "up 1\n"}
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=100)
    assert "outcome:|killed|signal 15 (SIGTERM)" in out
    assert "SignalException" in err
    assert process.returncode == 1


@pytest.mark.system
@pytest.mark.parametrize("last", [0, 5])
def test_a_group_that_was_restarted_does_not_take_its_exit_codes_with_it(tmp_path, last):
    """torchrun tells the failures of the last group only, and none if that ends well."""
    code = (
        "import os, sys, time\nlife = os.environ['TORCHELASTIC_RESTART_COUNT']\n"
        "if os.environ['RANK'] == '1':\n    if life == '0': os.kill(os.getpid(), 9)\n    if life == '1': sys.exit(7)\n"
        f"    sys.exit({last})\nif life != '2' or {last}: time.sleep(60)\n"
    )
    process = start(tmp_path, code, "--max-restarts", "2")
    out, _ = process.communicate(timeout=100)
    status = "failed|rank 1: exit code 5" if last else "finished|"
    assert f"outcome:|{status}\n" in out
    told = [line for line in out.splitlines() if line.startswith("rank:|1|")]
    assert told == ["rank:|1|-9|True", "rank:|1|7|True", *(["rank:|1|5|True"] if last else [])]
    assert process.returncode == bool(last)


@pytest.mark.system
def test_a_job_that_ends_well_prints_nothing(tmp_path):
    process = start(tmp_path, "import os\nos.write(1, os.environb[b'RANK'] + b'\\n')\n")
    out, _ = process.communicate(timeout=100)
    assert sorted(out.splitlines()) == ["0", "1", "outcome:|finished|"]
    assert process.returncode == 0


@pytest.mark.system
def test_an_error_of_torchrun_itself_is_a_failed_run(tmp_path):
    process = start(tmp_path, "", "--rdzv-backend", "no-such-backend", "--rdzv-endpoint", "localhost:1")
    out, err = process.communicate(timeout=100)
    assert "outcome:|failed|torchrun: ValueError" in out
    assert "Traceback" in err
    assert process.returncode == 1
