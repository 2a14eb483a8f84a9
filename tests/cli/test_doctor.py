"""`ddplog doctor`: settings with origins, checks with remedies, exit status."""

import importlib.metadata
import json
import os
import resource
import shutil
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from ddplog.cli import doctor
from ddplog.config import Settings


@pytest.fixture
def environ(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("DDPLOG_", "SLURM_")) or name in doctor.LAUNCHER_VARIABLES:
            monkeypatch.delenv(name)
    monkeypatch.setenv("DDPLOG_SPOOL", str(tmp_path / "spool"))
    return tmp_path


def states(checks):
    return {check.name: check.state for check in checks}


def only(checks):
    found = list(checks)
    assert len(found) == 1
    return found[0]


def test_settings_come_with_their_origin(environ, monkeypatch):
    monkeypatch.setenv("DDPLOG_PROJECT", "digits")
    (environ / "ddplog.toml").write_text("late_s = 2\n")
    settings, _ = doctor.examine(os.environ)
    rows = {row["name"]: row for row in doctor.list_settings(settings)}
    assert rows["project"] == {"name": "project", "value": "digits", "origin": "DDPLOG_PROJECT"}
    assert rows["late_s"]["origin"] == str(environ / "ddplog.toml")
    assert rows["grace_s"]["origin"] == "default"
    assert "origins" not in rows


def test_json_is_one_object_and_a_healthy_machine_exits_0(environ):
    done = CliRunner().invoke(doctor.command, ["--json"])
    found = json.loads(done.stdout)
    assert {"settings", "checks"} == set(found)
    problems = [check for check in found["checks"] if check["state"] == "problem"]
    assert done.exit_code == (1 if problems else 0)


def test_a_table_is_printed_with_the_remedies(environ, monkeypatch):
    monkeypatch.setenv("DDPLOG_SINKS", "nowhere")
    done = CliRunner().invoke(doctor.command)
    assert done.exit_code == 1
    assert "no such sink" in done.stdout
    assert "DDPLOG_SINKS" in done.stdout


def test_bad_settings_are_a_problem_and_the_other_checks_go_on(environ, monkeypatch):
    monkeypatch.setenv("DDPLOG_PORT", "nine")
    settings, checks = doctor.examine(os.environ)
    assert states(checks)["settings"] == "problem"
    assert states(checks)["python"] == "ok"
    assert settings.port == 0


def test_a_missing_or_old_package_is_a_problem(monkeypatch):
    def version(name):
        if name == "grpcio":
            raise importlib.metadata.PackageNotFoundError
        return {"pyzmq": "24.0.1"}.get(name, "9999.0")

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {check.name: check for check in doctor.check_versions()}
    assert (found["pyzmq"].state, found["pyzmq"].remedy) == ("problem", "pip install 'pyzmq>=25'")
    assert found["grpcio"].found == "not installed"
    assert found["torch"].state == "ok"


def test_missing_torch_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "torch" else "9999")
    assert {c.name: c.state for c in doctor.check_versions()}["torch"] == "warning"


def test_the_spool_must_be_private(environ):
    (environ / "open").mkdir(mode=0o755)
    check = only(doctor.check_spool(Settings(spool=str(environ / "open"))))
    assert check.state == "problem"
    assert "700" in check.found


def test_little_space_is_a_warning_and_none_a_problem(environ, monkeypatch):
    for free, state in ((10**9, "warning"), (10**6, "problem"), (10**11, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        checks = list(doctor.check_spool(Settings(spool=str(environ / "spool"))))
        assert states(checks)["spool space"] == state


def test_a_run_folder_is_checked_where_it_would_be_made(environ):
    found = list(doctor.check_run_folder(Settings(dir=str(environ / "a" / "b"))))
    assert states(found)["run folder"] == "ok"
    assert not (environ / "a").exists()


def test_a_run_folder_that_cannot_be_written_is_a_problem(environ):
    (environ / "file").touch()
    check = only(doctor.check_run_folder(Settings(dir=str(environ / "file"))))
    assert check.state == "problem"


def test_a_sink_without_its_extra_is_a_problem(monkeypatch):
    monkeypatch.setattr("ddplog.sinks._EXTRAS", {"tensorboard": "ddplog_no_such_module"})
    found = list(doctor.check_sinks(Settings(sinks=("jsonl", "tensorboard", "nowhere://x"))))
    assert [(c.name, c.state) for c in found] == [
        ("sink jsonl", "ok"),
        ("sink tensorboard", "problem"),
        ("sink nowhere", "problem"),
    ]
    assert found[1].remedy == "needs the package ddplog_no_such_module: pip install ddplog_no_such_module"


def test_a_mistyped_variable_is_named_with_what_it_may_mean(environ, monkeypatch):
    monkeypatch.setenv("DDPLOG_GRACE", "3")
    (check,) = doctor.check_variables(os.environ)
    assert (check.name, check.state, check.remedy) == ("DDPLOG_GRACE", "warning", "did you mean DDPLOG_GRACE_S?")


def test_few_descriptors_are_a_warning(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    check = only(doctor.check_limits())
    assert (check.state, check.found) == ("warning", "256 (hard limit unlimited)")


@pytest.mark.parametrize(
    ("environ", "state"),
    [
        ({}, "ok"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "ok"),
        ({"RANK": "0"}, "warning"),
        ({"SLURM_JOB_ID": "3"}, "ok"),
    ],
)
def test_half_a_ranks_variables_are_a_warning(environ, state):
    assert only(doctor.check_launcher(environ)).state == state


@pytest.mark.parametrize(
    ("text", "version"), [("27.1.0", (27, 1, 0)), ("4.3.3rc1", (4, 3, 3)), ("2.13.0+cpu", (2, 13, 0)), ("dev", ())]
)
def test_versions_are_compared_by_their_numbers(text, version):
    assert doctor.parse_version(text) == version


def test_torch_is_not_imported(environ):
    """It takes seconds, and may grab a GPU."""
    import subprocess
    import sys

    code = "import os, sys; from ddplog.cli import doctor; doctor.examine(os.environ); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "False\n"
