"""Which run an experiment joins, and what Comet's settings mean here."""

import pytest

from ddplog.comet import config

KEY = "a" * 32


def test_comets_project_is_ddplogs():
    assert config.make_settings({"project_name": "mnist"}) == {"name": None, "project": "mnist"}
    assert config.make_settings({"name": "mlp"}) == {"name": "mlp"}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("mnist", "mnist"),
        ("My project (v2)", "My-project-v2-"),
        ("_x", "x"),
        ("日本", "default"),
        ("x" * 200, "x" * 100),
    ],
)
def test_a_project_that_ddplog_would_refuse_is_rewritten(theirs, ours):
    """The script must run unchanged, and Comet's projects may have spaces."""
    assert config.as_project(theirs) == ours


def test_the_script_wins_over_our_variable_and_ours_over_comets(monkeypatch):
    monkeypatch.setenv("COMET_PROJECT_NAME", "comets")
    assert config.make_settings({})["project"] == "comets"

    monkeypatch.setenv("DDPLOG_PROJECT", "ours")
    assert "project" not in config.make_settings({})
    assert config.make_settings({"project_name": "scripts"})["project"] == "scripts"


def test_an_experiment_key_names_the_run(monkeypatch):
    assert config.make_settings({"experiment_key": KEY})["run_id"] == KEY
    assert config.make_settings({"previous_experiment": KEY})["run_id"] == KEY
    monkeypatch.setenv("COMET_EXPERIMENT_KEY", KEY)
    assert config.make_settings({})["run_id"] == KEY


def test_ddplogs_own_name_of_the_run_stands(monkeypatch):
    monkeypatch.setenv("DDPLOG_RUN_ID", "r1")

    assert "run_id" not in config.make_settings({"experiment_key": KEY})


def test_the_key_that_rank_0_passes_on_is_that_of_the_jobs_own_run():
    """Comet's example for torchrun broadcasts it; naming a run by it would split the job in two."""
    key = config.key_of_run("20260101-120000-ab12")

    assert "run_id" not in config.make_settings({"experiment_key": key})
    assert len(key) == 40
    assert key.isalnum()
    assert key == config.key_of_run("20260101-120000-ab12") != config.key_of_run("another")


def test_a_key_made_of_something_is_comets():
    """Comet 3.58.8 makes these of the same input."""
    assert config.get_experiment_key("run-42") == config.get_experiment_key(b"run-42")
    assert config.get_experiment_key("run-42") == "0f5104a3df9acb4fe362500f13756f1f195cfcce"
    assert config.get_experiment_key({"b": 1, "a": 2}) == "bfb36f31854e70b4a81372bbcf01a50570f3822e"
    assert config.get_experiment_key(None) != config.get_experiment_key(None)


def test_settings_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("COMET_WORKSPACE", "team")

    assert config.get_config("comet.workspace") == config.get_config()["comet.workspace"] == "team"
    assert config.get_config().get("comet.mode", "x") == "x"
    assert config.get_config("comet.mode") is None


def test_a_script_that_wants_a_key_gets_a_word(monkeypatch):
    """Frameworks and scripts refuse to start without one, and none is needed."""
    assert config.get_config("comet.api_key") == config.get_api_key() == config.NO_KEY
    assert config.get_api_key("given") == "given"
    monkeypatch.setenv("COMET_API_KEY", "secret-of-mine")
    assert config.get_config("comet.api_key") == "secret-of-mine"
    assert "secret" not in repr(config.get_config())


def test_a_short_word_is_no_key(monkeypatch):
    monkeypatch.setenv("COMET_API_KEY", "x")
    config.hide_from_now_on("y")
    config.hide_from_now_on(None)

    assert config.hide("x and y") == "x and y"
