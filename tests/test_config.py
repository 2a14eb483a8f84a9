"""Settings: which source wins, where a value came from, and what is said of one that cannot work."""

import os
from dataclasses import fields

import pytest

from ddplog.config import Settings, resolve
from ddplog.errors import ConfigError

SOURCES = ("ddplog.toml", "pyproject.toml", "environment", "argument")


def resolve_in(folder, toml=None, pyproject=None, environ=None, **arguments):
    if toml is not None:
        (folder / "ddplog.toml").write_text(toml)
    if pyproject is not None:
        (folder / "pyproject.toml").write_text(pyproject)
    return resolve(arguments, environ or {}, folder)


def refusal(folder, **sources):
    with pytest.raises(ConfigError) as caught:
        resolve_in(folder, **sources)
    return caught.value


@pytest.mark.parametrize(
    "given", [SOURCES[:n] for n in range(5)] + [("pyproject.toml",), ("pyproject.toml", "argument")]
)
def test_the_strongest_source_wins_and_is_named(tmp_path, given):
    settings = resolve_in(
        tmp_path,
        toml='project = "from-toml"' if "ddplog.toml" in given else None,
        pyproject='[tool.ddplog]\nproject = "from-pyproject"' if "pyproject.toml" in given else None,
        environ={"DDPLOG_PROJECT": "from-environment"} if "environment" in given else {},
        project="from-argument" if "argument" in given else None,
    )
    expected = {
        (): ("default", "default"),
        ("ddplog.toml",): ("from-toml", str(tmp_path / "ddplog.toml")),
        ("ddplog.toml", "pyproject.toml"): ("from-toml", str(tmp_path / "ddplog.toml")),
        ("pyproject.toml",): ("from-pyproject", str(tmp_path / "pyproject.toml")),
        SOURCES[:3]: ("from-environment", "DDPLOG_PROJECT"),
        SOURCES: ("from-argument", "argument"),
        ("pyproject.toml", "argument"): ("from-argument", "argument"),
    }[given]

    assert (settings.project, settings.origins["project"]) == expected


def test_each_setting_is_resolved_by_itself(tmp_path):
    """A file that sets one thing must not hide the default, or the variable, of another."""
    settings = resolve_in(tmp_path, toml="port = 7\ngrace_s = 3", environ={"DDPLOG_PORT": "8"}, tags=["a"])

    assert (settings.port, settings.grace_s, settings.tags, settings.late_s) == (8, 3.0, ("a",), 5.0)
    assert {name: origin for name, origin in settings.origins.items() if origin != "default"} == {
        "port": "DDPLOG_PORT",
        "grace_s": str(tmp_path / "ddplog.toml"),
        "tags": "argument",
    }


def test_every_setting_has_an_origin_and_can_be_given_by_its_variable(tmp_path):
    defaults = resolve_in(tmp_path)
    names = [f.name for f in fields(Settings) if f.name != "origins"]
    assert sorted(defaults.origins) == sorted(names)

    for name in names:
        value = getattr(defaults, name)
        text = (
            {"run_id": "r", "name": "n", "spool": "/s"}.get(name) or ",".join(value or ())
            if isinstance(value, (tuple, type(None)))
            else str(value)
        )
        settings = resolve_in(tmp_path, environ={f"DDPLOG_{name.upper()}": text})
        assert settings.origins[name] == f"DDPLOG_{name.upper()}", name
        assert getattr(settings, name) == (value if value is not None else text), name


def test_the_nearest_folder_upwards_with_settings_counts(tmp_path):
    """A pyproject.toml that says nothing of ddplog is not the end of the search: it may be a sub-package's."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (tmp_path / "ddplog.toml").write_text('project = "outer"')
    (inner / "pyproject.toml").write_text("[tool.other]\nx = 1")
    assert resolve({}, {}, inner).project == "outer"
    (tmp_path / "a" / "pyproject.toml").write_text('[tool.ddplog]\nproject = "middle"')

    assert resolve({}, {}, inner).project == "middle"


def test_an_argument_of_none_is_not_given(tmp_path):
    settings = resolve_in(tmp_path, environ={"DDPLOG_NAME": "n"}, name=None, port=None)

    assert (settings.name, settings.port, settings.origins["port"]) == ("n", 0, "default")


def test_without_arguments_the_process_is_asked(tmp_path, monkeypatch):
    (tmp_path / "ddplog.toml").write_text("port = 5")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DDPLOG_MODE", "off")

    settings = resolve()

    assert (settings.port, settings.mode) == (5, "off")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("strict", "1", True), ("strict", "Yes", True), ("strict", "ON", True), ("strict", "true", True),
        ("strict", "0", False), ("strict", "no", False), ("strict", "off", False), ("strict", "", False),
        ("sinks", "jsonl, tensorboard ,,", ("jsonl", "tensorboard")), ("sinks", "", ()),
        ("port", "80", 80), ("grace_s", "1e1", 10.0), ("grace_s", "0", 0.0), ("dir", "/a b", "/a b"),
    ],
)  # fmt: skip
def test_a_variable_is_text_of_the_settings_type(tmp_path, name, text, value):
    settings = resolve_in(tmp_path, environ={f"DDPLOG_{name.upper()}": text})

    assert (getattr(settings, name), type(getattr(settings, name))) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sinks", "jsonl,x://y", ("jsonl", "x://y")), ("sinks", ["jsonl"], ("jsonl",)), ("sinks", (), ()),
        ("grace_s", 3, 3.0), ("strict", True, True), ("port", 65535, 65535),
    ],
)  # fmt: skip
def test_an_argument_is_of_the_settings_type(tmp_path, name, value, expected):
    assert getattr(resolve_in(tmp_path, **{name: value}), name) == expected


def test_a_path_is_a_string(tmp_path):
    assert resolve_in(tmp_path, dir=tmp_path, spool=os.fspath(tmp_path)).dir == str(tmp_path)


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("DDPLOG_STRICT", "maybe", "one of 1, 0, true, false, yes, no, on, off"),
        ("DDPLOG_PORT", "1.5", "a whole number"),
        ("DDPLOG_GRACE_S", "soon", "a number"),
    ],
)
def test_a_variable_that_cannot_be_parsed_is_named(tmp_path, variable, text, allowed):
    error = refusal(tmp_path, environ={variable: text})

    assert (error.setting, error.value) == (variable, text)
    assert allowed in error.allowed
    assert all(part in str(error) for part in (variable, text, allowed))


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("resume", "maybe", "auto, never, must"), ("mode", "disabled", "on, off"),
        ("project", "", "letters"), ("project", "a/b", "letters"), ("run_id", "..", "letters"), ("run_id", "-x", "letters"),
        ("run_id", "x" * 101, "100"), ("run_id", "a\n", "letters"),
        ("exit_wait_s", -1.0, "between 0 and 86400"), ("grace_s", float("nan"), "between"),
        ("late_s", float("inf"), "between"), ("settle_s", 86401.0, "between"), ("drain_wait_s", -0.1, "between"),
        ("segment_bytes", 65535, "between 65536"), ("spool_bytes", 1, "between"), ("max_keys", 0, "between 1 and"),
        ("rank_log_bytes", 0, "between"), ("port", 65536, "65535"), ("port", -1, "65535"),
        ("sinks", ["jsonl", ""], "name"),
        ("sinks", [1], "list of strings"), ("sinks", {"a": 1}, "list of strings"), ("tags", 5, "list of strings"),
        ("port", 1.0, "int"), ("port", True, "int"), ("grace_s", "1", "float"), ("grace_s", True, "float"),
        ("strict", 1, "bool"), ("strict", "yes", "bool"), ("name", 3, "str"), ("dir", b"x", "str"),
    ],
)  # fmt: skip
def test_a_bad_argument_is_named_with_what_is_allowed(tmp_path, name, value, allowed):
    error = refusal(tmp_path, **{name: value})

    assert error.setting == name
    assert allowed in error.allowed
    assert name in str(error)
    if isinstance(value, (list, dict)):
        assert list(error.value) == list(value)
    else:
        assert error.value is value or error.value == value


@pytest.mark.parametrize("source", ["argument", "ddplog.toml", "pyproject.toml"])
def test_an_unknown_setting_is_an_error_that_lists_the_known(tmp_path, source):
    """A misspelt one would otherwise be ignored for the whole run."""
    sources = {
        "argument": {"projet": "x"},
        "ddplog.toml": {"toml": 'projet = "x"'},
        "pyproject.toml": {"pyproject": '[tool.ddplog]\nprojet = "x"'},
    }[source]
    error = refusal(tmp_path, **sources)

    assert error.setting.endswith("projet")
    assert error.value == "x"
    assert "project" in error.allowed
    assert source == "argument" or str(tmp_path / source) in str(error)


def test_origins_is_not_a_setting(tmp_path):
    assert refusal(tmp_path, origins={}).setting == "origins"
    assert resolve_in(tmp_path, environ={"DDPLOG_ORIGINS": "x"}).origins["port"] == "default"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ddplog.toml", "project = "),
        ("ddplog.toml", b'project = "\xff"'),
        ("pyproject.toml", "[tool]\nddplog = 5"),
    ],
)
def test_a_file_that_is_no_settings_file_is_named(tmp_path, name, text):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    assert str(tmp_path / name) in str(refusal(tmp_path))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "ddplog.toml").symlink_to("/proc/self/mem")  # reading its first page is an I/O error for everybody

    assert str(tmp_path / "ddplog.toml") in str(refusal(tmp_path))


def test_what_others_write_into_pyproject_is_not_ours_to_refuse(tmp_path):
    assert resolve_in(tmp_path, pyproject="tool = 5") == resolve_in(tmp_path)


def test_a_wrong_type_in_a_file_is_named(tmp_path):
    """And so is the file: it may be one that somebody else wrote."""
    assert refusal(tmp_path, toml='port = "80"').setting == f"{tmp_path / 'ddplog.toml'}: port"


def test_sampling_is_off_or_not_too_often(tmp_path):
    assert resolve_in(tmp_path, sample_s=0.0).sample_s == 0
    assert refusal(tmp_path, sample_s=-1.0).allowed == "must be 0 (none), or between 1 and 3600"
