"""`ddplog run`: which launcher is meant, what reaches the ranks, and what is checked before the start."""

import os
import socket
import subprocess
import sys

import pytest

from ddplog.cli import run
from ddplog.errors import ConfigError
from ddplog.launch import torchrun


@pytest.fixture
def spool(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPLOG_SPOOL", str(tmp_path / "spool"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "spool"


def cli(*words, **environ):
    return subprocess.run(
        [sys.executable, "-m", "ddplog.cli.main", "run", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
    )


@pytest.mark.parametrize(
    ("words", "command"),
    [
        (["--", "sh", "-c", "x"], ["sh", "-c", "x"]),
        (["--project", "p", "--quiet", "--", "sh"], ["sh"]),
        (["--sink", "a", "--sink=b", "--", "sh", "--", "y"], ["sh", "--", "y"]),
        (["train.py", "--", "x"], None),
        (["--nproc-per-node", "2", "--", "train.py"], None),
        (["--project", "p", "train.py"], None),
        ([], None),
    ],
)
def test_a_command_follows_our_options_and_two_dashes(words, command):
    """Behind a script or torchrun's options, `--` means what it means to torchrun."""
    assert run._split_command(words)[1] == command


def test_two_dashes_without_a_command_are_an_error(capsys):
    with pytest.raises(SystemExit) as caught:
        run._split_command(["--"])
    assert caught.value.code == 2
    assert "no command" in capsys.readouterr().err


def test_our_options_become_variables_and_others_stay(tmp_path, monkeypatch):
    """Variables, so that the script's own arguments to init() still win."""
    monkeypatch.chdir(tmp_path)
    words = [
        "--project",
        "p",
        "--name",
        "n",
        "--run-id",
        "r",
        "--dir",
        "d",
        "--sink",
        "a",
        "--sink",
        "b://c",
        "--tag",
        "t",
    ]
    ours, _ = run._split_command([*words, "--", "sh"])
    environ = run._make_environ(ours, {"HOME": "/h", "DDPLOG_JOB": "outer", "DDPLOG_TAGS": "old"})
    job = environ.pop("DDPLOG_JOB")
    assert environ == {
        "HOME": "/h",
        "DDPLOG_PROJECT": "p",
        "DDPLOG_NAME": "n",
        "DDPLOG_RUN_ID": "r",
        "DDPLOG_DIR": str(tmp_path / "d"),
        "DDPLOG_SINKS": "a,b://c",
        "DDPLOG_TAGS": "t",
    }
    assert len(job) == 16
    assert int(job, 16) >= 0


def test_a_captured_tracker_is_in_the_environment():
    ours, _ = run._split_command(["--capture", "comet", "--", "sh"])
    environ = run._make_environ(ours, {"PYTHONPATH": "/x"})

    assert environ["DDPLOG_CAPTURE"] == "comet_ml=ddplog.comet"
    assert environ["PYTHONPATH"].endswith(":/x")


@pytest.mark.parametrize("words", [["--", "sh"], ["train.py"]])
def test_a_tracker_that_cannot_be_captured_is_refused(words):
    done = cli("--capture", "comte", *words)

    assert done.returncode == 2
    assert "argument --capture: invalid choice: 'comte' (choose from" in done.stderr
    assert "comet" in done.stderr.rpartition("choose from")[2]


@pytest.mark.parametrize(
    ("words", "incomplete", "offered"),
    [
        ([], "--ca", ["--capture"]),
        (["--capture"], "", ["comet"]),
        (["--capture"], "w", []),
        (["--capture", "comet"], "--q", ["--quiet"]),
        ([], "train", []),
    ],
)
def test_the_shell_completes_our_options(words, incomplete, offered):
    """click knows none of them: argparse parses this command's line."""
    context = run.command.make_context("run", list(words))

    assert [item.value for item in run.command.shell_complete(context, incomplete)] == offered


def test_every_job_has_its_own_key():
    ours, _ = run._split_command(["--", "sh"])
    assert run._make_environ(ours, {})["DDPLOG_JOB"] != run._make_environ(ours, {})["DDPLOG_JOB"]


def test_torchruns_parser_takes_both_kinds_of_options():
    parser = run._add_options(torchrun.make_parser())
    found = parser.parse_args(["--project", "p", "--nproc-per-node", "3", "--tag", "x", "train.py", "--name", "theirs"])
    assert (found.project, found.nproc_per_node, found.tag, found.name) == ("p", "3", ["x"], None)
    assert found.training_script_args == ["--name", "theirs"]


def test_our_options_take_no_name_that_torchrun_has():
    theirs = {option for action in torchrun.make_parser()._actions for option in action.option_strings}
    import argparse

    ours = {
        option
        for action in run._add_options(argparse.ArgumentParser(add_help=False))._actions
        for option in action.option_strings
    }
    assert not ours & theirs


def test_a_folder_that_can_be_made_is_fine_and_is_not_made(tmp_path):
    run.check_folder(tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is not a folder"):
        run.check_folder(tmp_path / "file" / "runs")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(ConfigError, match="cannot be written"):
        run.check_folder(tmp_path / "runs")


def test_the_default_folder_is_not_checked(spool, monkeypatch):
    """The script may well pass another one to init()."""
    monkeypatch.setattr(run.os, "access", lambda path, mode: False)
    run.check_settings({"DDPLOG_SPOOL": str(spool)})


def test_a_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="cannot listen"):
            run.check_port("127.0.0.1", port)
    run.check_port("127.0.0.1", port)


def test_a_host_that_is_not_ours_is_refused():
    with pytest.raises(ConfigError):
        run.check_port("192.0.2.1", 9)


def test_logging_that_is_off_needs_no_folder(tmp_path):
    settings = run.check_settings({"DDPLOG_MODE": "off", "DDPLOG_DIR": "/proc/no", "DDPLOG_SPOOL": "/proc/no"})
    assert settings.mode == "off"


@pytest.mark.system
def test_a_commands_streams_and_exit_code_pass_through(spool):
    done = cli("--project", "p", "--", "sh", "-c", "echo $DDPLOG_PROJECT $DDPLOG_JOB; exit 7")
    assert done.returncode == 7
    project, job = done.stdout.split()
    assert (project, len(job)) == ("p", 16)
    assert done.stderr == "ddplog: the job never called ddplog.init(): there is no run to show\n"


@pytest.mark.system
def test_a_command_that_dies_of_a_signal_kills_us_by_it(spool):
    assert cli("--quiet", "--", "sh", "-c", "kill -9 $$").returncode == -9


@pytest.mark.system
@pytest.mark.parametrize(("name", "code"), [("ddplog-no-such-command", 127), ("/", 126)])
def test_a_command_that_cannot_start_says_so(spool, name, code):
    done = cli("--", name)
    assert done.returncode == code
    assert name in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.system
def test_a_setting_that_cannot_work_stops_the_job_before_it_starts(spool):
    done = cli("--project", "no spaces", "--", "sh", "-c", "echo started")
    assert (done.returncode, done.stdout) == (2, "")
    assert "project='no spaces'" in done.stderr


@pytest.mark.system
def test_a_script_that_is_not_there_is_exit_code_2(spool):
    done = cli("no_such_script.py")
    assert done.returncode == 2
    assert "no_such_script.py" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.system
def test_help_shows_our_options_and_torchruns(spool):
    done = cli("--help")
    assert done.returncode == 0
    assert "--no-summary" in done.stdout
    assert "--nproc-per-node" in done.stdout


@pytest.mark.system
def test_ranks_get_the_job_and_the_options(spool, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os\n"
        "line = ' '.join(os.environ[name] for name in ('DDPLOG_JOB', 'DDPLOG_TAGS', 'RANK'))\n"
        "os.write(1, f'{line}\\n'.encode())  # print() may be two writes\n"
    )
    done = cli("--tag", "a", "--tag", "b", "--nproc-per-node", "2", str(script))
    assert done.returncode == 0, done.stderr
    first, second = sorted(line.split() for line in done.stdout.splitlines())
    assert first[0] == second[0]
    assert (first[1:], second[1:]) == (["a,b", "0"], ["a,b", "1"])
