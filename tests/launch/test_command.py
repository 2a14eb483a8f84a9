"""Any command as the job: exit codes, signals and streams pass through untouched."""

import os
import signal
import subprocess
import sys

import pytest

from ddplog.launch.command import run_command

pytestmark = pytest.mark.system

DRIVER = """
import os, sys
from ddplog.launch.command import die_of, run_command
outcome, problem = run_command(sys.argv[1:], os.environ)
print(outcome.status, outcome.detail, problem, sep="|", file=sys.stderr, flush=True)
if outcome.death_signal is not None:
    die_of(outcome.death_signal)
sys.exit(outcome.exit_code)
"""
CHILD = """
import signal, sys, time
def take(number, frame):
    print("got", number, flush=True)
    sys.exit(int(sys.argv[2]))
signal.signal(getattr(signal, sys.argv[1]), take)
print("ready", flush=True)
while True:
    time.sleep(30)
"""
TERMINAL = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
seen = b""
while b"ready" not in seen:
    seen += os.read(terminal, 1024)
os.write(terminal, b"\\x03")
while b"killed|" not in seen:
    seen += os.read(terminal, 1024)
print(seen.decode())
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
"""Runs a command on a terminal and presses Ctrl-C. A process of its own: pytest has threads, and this forks."""


def drive(*words, **options):
    return subprocess.run(
        [sys.executable, "-c", DRIVER, *words], capture_output=True, text=True, check=False, timeout=60, **options
    )


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_the_exit_code_is_the_commands(code):
    done = drive("sh", "-c", f"exit {code}")
    assert done.returncode == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT])
def test_a_killed_command_kills_us_by_the_same_signal(number):
    """A shell or a scheduler above must see what it would have seen without us."""
    done = drive("sh", "-c", f"kill -{number} $$")
    assert done.returncode == -number
    assert done.stderr.startswith(f"failed|signal {number:d} (")


def test_streams_are_inherited():
    done = drive("sh", "-c", "cat; echo problem >&2", input="through stdin")
    assert done.stdout == "through stdin"
    assert done.stderr.splitlines()[0] == "problem"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGINT"])
def test_signals_are_passed_on(name):
    """SIGINT, too, where no terminal has sent it to both: `kill -INT`, or a notebook's stop button."""
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, sys.executable, "-c", CHILD, name, "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(getattr(signal, name), signal.SIG_DFL),  # noqa: PLW1509 - no thread here; under nohup, SIGHUP is ignored
    )
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(getattr(signal, name))
        out, _ = process.communicate(timeout=60)
    assert out == f"got {getattr(signal, name):d}\n"
    assert process.returncode == 5


def test_ctrl_c_on_a_terminal_is_not_passed_on():
    """The terminal sends it to the whole process group: passing it on would make two of it."""
    traced = "import subprocess; subprocess.Popen.send_signal = lambda *a: print('passed on', flush=True)\n" + DRIVER
    words = [sys.executable, "-c", traced, sys.executable, "-c", CHILD, "SIGINT", "5"]
    done = subprocess.run(
        [sys.executable, "-c", TERMINAL, *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert "got 2" in done.stdout
    assert "passed on" not in done.stdout
    assert done.returncode == 5


def test_what_nohup_ignores_stays_ignored():
    done = subprocess.run(
        [
            "sh",
            "-c",
            'trap "" HUP; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            DRIVER,
            "sh",
            "-c",
            "kill -HUP $PPID; exit 3",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 3
    assert "failed|exit code 3" in done.stderr


def test_a_command_that_is_not_there_is_127():
    outcome, problem = run_command(["ddplog-no-such-command"], os.environ)
    assert outcome.exit_code == 127
    assert problem == "ddplog-no-such-command: command not found"


def test_a_command_that_cannot_be_executed_is_126(tmp_path):
    path = tmp_path / "script"
    path.write_text("#!/bin/sh\n")
    assert run_command([str(path)], os.environ)[0].exit_code == 126
    assert run_command([str(tmp_path)], os.environ)[0].exit_code == 126


def test_a_file_that_is_no_program_is_126(tmp_path):
    path = tmp_path / "script"
    path.write_text("neither a binary nor a shebang\n")
    path.chmod(0o755)
    assert run_command([str(path)], os.environ)[0].exit_code == 126


def test_handlers_are_put_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    run_command(["true"], os.environ)
    assert {number: signal.getsignal(number) for number in before} == before
