"""The frozen public names, signatures and command-line flags: changing one is a decision, not an accident."""

import inspect

import click
import pytest

import ddplog
from ddplog.cli.main import COMMANDS, cli


def test_the_public_names():
    assert sorted(ddplog.__all__) == [
        "ConfigError", "DdplogError", "LocalProtocolError", "PermanentSinkError", "RemoteProtocolError",
        "RetryableSinkError", "Run", "RunNotFoundError", "SinkError", "UsageError", "alert", "attach", "define_metric",
        "finish", "flush", "init", "log", "log_params", "log_text", "open_run", "set_step",
    ]  # fmt: skip
    for name in ddplog.__all__:
        assert getattr(ddplog, name).__doc__
        assert name in dir(ddplog)


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        ddplog.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("log", ["data", "step", "weight"]),
        ("log_params", ["params"]),
        ("log_text", ["key", "text", "step"]),
        ("set_step", ["step"]),
        ("define_metric", ["pattern", "reduce", "replicated"]),
        ("flush", []),
        ("finish", ["status", "detail"]),
        ("alert", ["title", "text", "level"]),
    ],
)
def test_functions_of_the_module_are_those_of_the_run(name, parameters):
    method = inspect.signature(getattr(ddplog.Run, name)).parameters
    function = inspect.signature(getattr(ddplog, name)).parameters

    assert list(function) == parameters
    assert list(method) == ["self", *parameters]
    for parameter in parameters:
        assert function[parameter].default == method[parameter].default
        assert function[parameter].kind == method[parameter].kind


def test_the_parameters_of_init():
    assert list(inspect.signature(ddplog.init).parameters) == [
        "project", "name", "run_id", "config", "tags", "dir", "sinks", "resume", "settings",
    ]  # fmt: skip


def test_without_init_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr("ddplog.worker.current.run", None)

    with pytest.raises(ddplog.UsageError, match=r"call ddplog\.init\(\) first"):
        ddplog.log({"a": 1.0})
    ddplog.finish()


def test_the_commands_and_their_flags():
    flags = {}
    for name in COMMANDS:
        command = cli.get_command(click.Context(cli), name)
        assert command.help or name == "run"
        flags[name] = sorted(
            option for parameter in command.params for option in parameter.opts if option.startswith("--")
        )

    assert flags == {
        "run": [],  # it parses torchrun's flags with its own; tests/cli/test_run.py
        "ls": ["--dir", "--json"],
        "show": ["--dir", "--json", "--metric", "--ranks"],
        "top": ["--dir", "--interval", "--once"],
        "stacks": ["--dir", "--json", "--rank", "--wait"],
        "report": ["--dir", "--open", "--output"],
        "sync": ["--dir", "--timeout", "--to"],
        "export": ["--dir", "--format", "--keys", "--output"],
        "doctor": ["--json"],
    }
