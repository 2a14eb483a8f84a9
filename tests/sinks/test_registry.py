"""A sink is found by name; one that cannot be found says what to do."""

import sys
from importlib.metadata import EntryPoint

import pytest

import ddplog.sinks
from ddplog.errors import ConfigError
from ddplog.sinks import SinkSpec, available, make_sink, parse_spec


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("jsonl", SinkSpec("jsonl")),
        ("jsonl:///a/b", SinkSpec("jsonl", "/a/b")),
        ("comet://team/project", SinkSpec("comet", "team/project")),
        ("x://a://b", SinkSpec("x", "a://b")),
    ],
)
def test_a_spec_is_a_name_and_perhaps_a_target(text, spec):
    assert parse_spec(text) == spec


@pytest.mark.parametrize("text", ["", "://x", "a/b", "../x", "a:b", "9x", "x" * 51])
def test_anything_else_is_a_config_error(text):
    with pytest.raises(ConfigError):
        parse_spec(text)


def test_two_targets_of_one_sink_have_two_folders():
    names = {parse_spec(text).folder_name for text in ("jsonl", "jsonl:///a", "jsonl:///b")}
    assert len(names) == 3
    assert "jsonl" in names
    assert all("/" not in name for name in names)


def test_the_built_in_sinks_need_no_install(monkeypatch):
    monkeypatch.setattr(ddplog.sinks, "entry_points", lambda **_: ())
    assert available() == ("jsonl", "tensorboard")
    assert make_sink("jsonl").capabilities.promise == "exactly once"
    assert not make_sink("tensorboard").capabilities.can_overwrite


def test_a_plug_in_is_found_by_its_entry_point(monkeypatch):
    found = EntryPoint("memory", "types:SimpleNamespace", "ddplog.sinks")
    monkeypatch.setattr(
        ddplog.sinks, "entry_points", lambda *, group, name=None: [found] if name in (None, "memory") else []
    )
    assert make_sink("memory://x").target == "x"
    assert "memory" in available()


def test_an_unknown_sink_is_named_with_what_there_is():
    with pytest.raises(ConfigError) as caught:
        make_sink("comte://x")
    assert caught.value.value == "comte"
    assert "jsonl, tensorboard" in caught.value.allowed
    assert "ddplog[comte]" in caught.value.allowed


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "ddplog.sinks.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
    with pytest.raises(ConfigError) as caught:
        make_sink("tensorboard")
    assert "pip install 'ddplog[tensorboard]'" in caught.value.allowed
