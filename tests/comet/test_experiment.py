"""What becomes of each of Comet's calls: the record in the journal, and what the script gets back."""

import argparse
import pickle

import numpy as np
import pytest
import torch

import ddplog.comet as comet_ml
from ddplog.comet import config
from ddplog.comet.untaken import METHODS, StandIn
from ddplog.errors import ConfigError, UsageError
from ddplog.worker import current


def only_metrics(logged):
    return [(step, values) for step, values in logged.metrics if "epoch" not in values]


# -- numbers


def test_a_metric_is_logged_under_its_own_name(experiment, logged):
    experiment.log_metric("loss", 0.5, step=3)
    experiment.log_metrics({"acc": 0.25, "f1": 1}, step=4)

    assert logged.metrics == [(3, {"loss": 0.5}), (4, {"acc": 0.25, "f1": 1.0})]


def test_a_step_stands_until_the_next_one_is_given(experiment, logged):
    """As in Comet: a validation that gives none is at the step that training has come to."""
    experiment.log_metric("loss", 1.0, step=7)
    experiment.log_metric("acc", 2.0)
    experiment.set_step(9)
    experiment.log_metrics({"acc": 3.0})
    experiment.set_step(None)
    experiment.log_metric("acc", 4.0)

    assert [step for step, _ in logged.metrics] == [7, 7, 9, 9]
    assert experiment.curr_step == 9


def test_without_any_step_the_calls_are_counted_by_name(experiment, logged):
    for value in (1.0, 2.0, 3.0):
        experiment.log_metric("loss", value)
    experiment.log_metric("other", 9.0)

    assert logged.metrics == [(0, {"loss": 1.0}), (1, {"loss": 2.0}), (2, {"loss": 3.0}), (0, {"other": 9.0})]


@pytest.mark.parametrize("step", [5, 5.0, np.int64(5), torch.tensor(5)], ids=repr)
def test_a_step_of_any_library_is_taken(experiment, logged, step):
    experiment.log_metric("loss", 1.0, step=step)

    assert logged.metrics == [(5, {"loss": 1.0})]


@pytest.mark.parametrize("step", [5.5, "5", None], ids=repr)
def test_a_step_that_is_none_leaves_the_one_before(experiment, logged, step):
    """Comet ignores it and logs the value; dropping the value would lose more."""
    experiment.log_metric("loss", 1.0, step=3)
    if step is None:
        experiment.log_metric("loss", 2.0, step=step)
    else:
        with pytest.warns(RuntimeWarning, match="whole number"):
            experiment.log_metric("loss", 2.0, step=step)

    assert [step for step, _ in logged.metrics] == [3, 3]


def test_an_epoch_is_a_metric_when_it_changes(experiment, logged):
    experiment.log_metric("loss", 1.0, step=1, epoch=0)
    experiment.log_metric("loss", 2.0, step=2, epoch=0)
    experiment.log_epoch_end(1, step=3)
    experiment.set_epoch(1)
    experiment.log_current_epoch(2)

    assert logged.metrics == [
        (1, {"epoch": 0.0}), (1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"epoch": 1.0}), (3, {"epoch": 2.0}),
    ]  # fmt: skip
    assert experiment.curr_epoch == 2


def test_a_context_is_a_prefix(experiment, logged):
    with experiment.train() as inside:
        assert inside is experiment
        experiment.log_metric("loss", 1.0, step=1)
        with experiment.validate():
            experiment.log_metrics({"loss": 2.0, "acc": 3.0}, prefix="top5")
        experiment.log_metric("loss", 4.0, include_context=False)
    with experiment.test(), experiment.context_manager("mine"):
        experiment.log_metric("loss", 5.0)
    experiment.log_metric("loss", 6.0)

    assert [values for _, values in logged.metrics] == [
        {"train_loss": 1.0}, {"validate_top5_loss": 2.0, "validate_top5_acc": 3.0}, {"loss": 4.0}, {"mine_loss": 5.0},
        {"loss": 6.0},
    ]  # fmt: skip


def test_a_context_ends_with_an_exception(experiment):
    with pytest.raises(ZeroDivisionError), experiment.train():
        1 / 0  # noqa: B018

    assert experiment.context is None


def test_nested_metrics_are_joined_by_a_slash(experiment, logged):
    experiment.log_metrics({"a": {"b": {"c": 1.0}, "d": 2.0}, 3: 3.0}, prefix="x", step=0)

    assert logged.metrics == [(0, {"x_a/b/c": 1.0, "x_a/d": 2.0, "x_3": 3.0})]


@pytest.mark.parametrize(
    "value", [0.5, np.float32(0.5), np.array([0.5]), torch.tensor(0.5), torch.tensor([0.5]), [0.5], (0.5,)], ids=repr
)
def test_a_number_of_any_library_is_taken_as_comet_takes_it(experiment, logged, value):
    experiment.log_metric("x", value, step=1)

    assert logged.metrics == [(1, {"x": 0.5})]
    assert experiment.get_metric("x") in (0.5, [0.5])


@pytest.mark.parametrize("value", [None, "high", [1, 2], object()], ids=["None", "text", "list", "object"])
def test_what_is_no_number_is_counted_and_does_not_raise(experiment, value):
    with pytest.warns(RuntimeWarning, match="log\\(\\) takes"):
        experiment.log_metric("x", value)
    with pytest.warns(RuntimeWarning, match="takes a dict"):
        experiment.log_metrics([1.0])

    assert dict(experiment.run.drops) == {"bad_value": 1, "unsupported": 1}


def test_the_last_value_of_a_tensor_holds_no_graph(experiment):
    """A loss with its graph would keep every activation of the step alive until the name is logged again."""
    weight = torch.ones(1, requires_grad=True)
    experiment.log_metric("loss", (weight * 2).sum())

    assert experiment.metrics["loss"].grad_fn is None
    assert experiment.get_metric("loss") == 2.0
    with pytest.raises(KeyError):
        experiment.get_metric("acc")


# -- parameters and words


def test_parameters_are_logged_with_their_prefix_and_context(experiment, logged):
    experiment.log_parameter("lr", 0.1)
    experiment.log_parameters({"depth": 3, "name": "mlp"}, prefix="net")
    experiment.log_parameters({"x": True}, prefix="net.")
    with experiment.train():
        experiment.log_parameter("batch", 32)

    assert logged.params == {"lr": 0.1, "net_depth": 3, "net_name": "mlp", "net.x": True, "train_batch": 32}


def test_nested_parameters_are_joined_as_comet_joins_them(experiment, logged):
    experiment.log_parameters({"model": {"lr": 0.1, "sizes": [64, 10], "none": {}}, 1: "one"})

    assert logged.params == {"model|lr": 0.1, "model|sizes": "[64, 10]", "model|none": "{}", "1": "one"}
    assert experiment.get_parameter("model|lr") == 0.1


def test_parameters_may_be_an_object(experiment, logged):
    experiment.log_parameters(argparse.Namespace(lr=0.1, name="mlp"))

    assert {"lr": 0.1, "name": "mlp"}.items() <= logged.params.items()


def test_a_parameter_of_any_library_is_a_plain_one(experiment, logged):
    experiment.log_parameters({"a": np.float64(0.5), "b": torch.tensor(2), "c": torch.tensor([1, 2])})

    assert logged.params == {"a": 0.5, "b": 2, "c": "tensor([1, 2])"}


def test_what_this_rank_changes_is_kept_beside_the_first_value(experiment, logged):
    """A run has one value of each parameter, and another rank's other value is a disagreement; this one is none."""
    experiment.log_other("best", 0.5)
    experiment.log_other("best", 0.5)
    experiment.set_step(4)
    experiment.log_other("best", 0.75)
    experiment.log_parameter("lr", 0.1)
    experiment.log_parameter("lr", 0.2)

    assert logged.params == {"other/best": 0.5, "lr": 0.1}
    assert logged.texts == [(4, "other/best", "0.75"), (4, "lr", "0.2")]
    assert (experiment.get_other("best"), experiment.get_parameter("lr")) == (0.75, 0.2)


def test_a_parameter_is_found_with_and_without_its_context(experiment):
    experiment.log_parameter("lr", 0.1)
    with experiment.train():
        experiment.log_parameter("lr", 0.2)
        assert experiment.get_parameter("lr") == 0.2
    assert experiment.get_parameter("lr") == 0.1
    assert experiment.get_parameter("train_lr") == 0.2
    with pytest.raises(KeyError):
        experiment.get_parameter("momentum")


def test_tags_names_and_facts_are_parameters(experiment, logged):
    assert experiment.add_tag("a")
    assert experiment.add_tags(["b", "c"])
    experiment.set_name("mine")
    experiment.log_others({"seed": 1, 2: "two"})
    experiment.log_dependency("torch", "2.13")
    experiment.log_dataset_info("mnist", version="2", path="/data")
    experiment.log_dataset_hash([1, 2])

    assert logged.params == {
        "tag/a": True, "tag/b": True, "tag/c": True, "other/Name": "mine", "other/seed": 1, "other/2": "two",
        "dependency/torch": "2.13", "other/dataset_info": "mnist-2, /data", "dataset_hash": "04cd0e0151f3",
    }  # fmt: skip
    assert sorted(experiment.get_tags()) == ["a", "b", "c"]
    assert experiment.get_name() == "mine"


def test_a_tag_that_is_no_word_is_refused_as_comet_does(experiment):
    with pytest.warns(RuntimeWarning, match="tags must be words"):
        assert not experiment.add_tag(3)
    assert not experiment.add_tags("abc")
    with pytest.warns(RuntimeWarning, match="takes a dict"):
        experiment.log_others("abc")


def test_texts_and_notifications(experiment, logged):
    experiment.log_text("a sample", step=3)
    experiment.set_step(5)
    assert experiment.log_text("another")["assetId"] == ""
    experiment.log_html("<b>x</b>")
    experiment.log_html_url("example.org", label="see")
    experiment.log_system_info("driver", 5)
    experiment.send_notification("done", "finished", {"acc": 0.5})

    assert logged.texts == [
        (3, "text", "a sample"), (5, "text", "another"), (5, "html", "<b>x</b>"), (5, "html", "see example.org"),
        (5, "system/driver", "5"),
    ]  # fmt: skip
    (alert,) = logged.messages("alert")
    assert (alert.message["title"], alert.message["text"], alert.message["level"]) == (
        "done",
        "finished, acc=0.5",
        "info",
    )
    with pytest.warns(RuntimeWarning, match="only the text"):
        experiment.log_text("c", metadata={"a": 1})


class Broken:
    """An object whose every use fails."""

    def __str__(self):
        raise RuntimeError("never")

    __repr__ = __len__ = __eq__ = __hash__ = __getattr__ = __str__


BROKEN = Broken()


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.log_metric("x", BROKEN),
        lambda e: e.log_metric("x", 1.0, step=BROKEN),
        lambda e: e.log_metric("x", 1.0, epoch=BROKEN),
        lambda e: e.log_metric("x", 1.0, epoch=np.array([1, 2])),
        lambda e: e.log_metrics(BROKEN),
        lambda e: e.log_metrics({"x": 1.0}, prefix=3),
        lambda e: e.log_parameters(BROKEN, prefix=3),
        lambda e: e.log_parameters({"x": BROKEN}),
        lambda e: e.log_parameters(None),
        lambda e: e.log_other("x", BROKEN),
        lambda e: e.log_others(BROKEN),
        lambda e: e.add_tag(BROKEN),
        lambda e: e.add_tags(5),
        lambda e: e.log_text(BROKEN),
        lambda e: e.log_html(BROKEN, clear=True),
        lambda e: e.send_notification("x", BROKEN, {"x": BROKEN}),
        lambda e: e.send_notification("x", additional_data=3),
        lambda e: e.log_image(BROKEN),
        lambda e: e.set_step(BROKEN),
        lambda e: e.set_epoch(BROKEN),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_nothing_raises_into_the_training_loop(experiment, call):
    call(experiment)
    experiment.log_metric("after", 1.0)

    assert experiment.get_metric("after") == 1.0


# -- what is not taken


@pytest.mark.parametrize("name", METHODS)
def test_a_call_that_is_not_taken_is_counted_and_warned_about_once(experiment, name):
    with pytest.warns(RuntimeWarning, match=rf"ddplog: {name}\(\): ") as caught:
        answers = [getattr(experiment, name)("x", 1, step=2), getattr(experiment, name)()]

    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert dict(experiment.run.drops) == {"unsupported": 2}
    for answer in answers:
        assert answer is None or isinstance(answer, (dict, list, StandIn))


def test_an_answer_can_be_looked_into(experiment):
    """Scripts note the id of what they have uploaded."""
    with pytest.warns(RuntimeWarning, match="log_image"):
        image = experiment.log_image(np.zeros((2, 2)))
    with pytest.warns(RuntimeWarning, match="get_keras_callback"):
        callback = experiment.get_keras_callback()

    assert image["imageId"] == image["web"] == ""
    assert callback.on_epoch_end(1, {}) is None


def test_a_name_that_comet_does_not_have_is_an_attribute_error(experiment):
    with pytest.raises(AttributeError):
        experiment.log_everything  # noqa: B018
    assert not hasattr(experiment, "log_everything")


def test_objects_of_comets_are_accepted(experiment):
    with pytest.warns(RuntimeWarning, match="Artifact: nothing is kept"):
        artifact = comet_ml.Artifact("data", "dataset")
    artifact.add("file")
    with pytest.raises(AttributeError):
        artifact._private  # noqa: B018
    with pytest.warns(RuntimeWarning, match="log_artifact"):
        assert experiment.log_artifact(artifact) is None


def test_before_a_run_the_warning_is_the_only_count():
    with pytest.warns(RuntimeWarning, match="APIExperiment"):
        assert comet_ml.APIExperiment("x").get_metrics() is None


def test_an_optimizer_cannot_be_had():
    """Training with no parameters, or with made-up ones, is worse than an error at the start."""
    with pytest.raises(UsageError, match="Comet's server"):
        comet_ml.Optimizer({})


def test_the_integration_with_pytorch(experiment):
    from ddplog.comet.integration.pytorch import load_model, log_model, watch

    with pytest.warns(RuntimeWarning, match="log_model"):
        log_model(experiment, torch.nn.Linear(1, 1), "net")
    with pytest.warns(RuntimeWarning, match="watch"):
        watch(torch.nn.Linear(1, 1))
    with pytest.raises(UsageError, match=r"torch\.load"):
        load_model("experiment://x")
    assert dict(experiment.run.drops) == {"unsupported": 2}


def test_what_frameworks_call_is_the_same(experiment, logged):
    experiment.__internal_api__log_metric__("a", 1.0, step=1, framework="x")
    experiment.__internal_api__log_metrics__({"b": 2.0}, step=2, epoch=1, framework="x")
    experiment.__internal_api__log_parameters__({"lr": {"x": 1}}, framework="x", flatten_nested=True)
    with pytest.warns(RuntimeWarning, match="set_model_graph"):
        experiment.__internal_api__set_model_graph__("graph", framework="x")

    assert only_metrics(logged) == [(1, {"a": 1.0}), (2, {"b": 2.0})]
    assert logged.params == {"lr|x": 1}


# -- its life


def test_an_experiment_uses_the_run_that_is_there_and_leaves_it_open(experiment, run):
    assert experiment.run is run
    assert comet_ml.get_running_experiment() is comet_ml.get_global_experiment() is experiment
    assert experiment.alive
    assert experiment.url == "file:///runs/r1"
    assert not experiment.stop_early(3)
    experiment.disable_mp()
    assert experiment.flush(timeout=1)
    assert comet_ml.flush()
    comet_ml.end()
    assert experiment.clean()
    assert experiment.ended
    assert not experiment.alive
    run.log({"x": 1.0})
    assert dict(run.drops) == {}


def test_a_disabled_experiment_takes_everything_and_joins_nothing(tmp_path):
    """The examples give such a one to every rank but the first."""
    experiment = comet_ml.Experiment(disabled=True)
    with experiment.train():
        experiment.log_metric("loss", 1.0, step=1, epoch=1)
    experiment.log_parameters({"a": 1})
    experiment.log_image(None)
    experiment.log_text("x")
    experiment.send_notification("x")
    experiment.end()

    assert (experiment.alive, experiment.url, current.run) == (False, None, None)
    assert experiment.get_metric("loss") == 1.0
    assert list(tmp_path.iterdir()) == []


def test_with_mode_off_it_takes_everything_too(monkeypatch, tmp_path):
    monkeypatch.setenv("DDPLOG_MODE", "off")
    experiment = comet_ml.start(project_name="x")
    experiment.log_metric("loss", 1.0, step=1)
    experiment.log_image(None)
    experiment.end()

    assert experiment.url is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "args"),
    [
        (comet_ml.Experiment, ("key", "project", "workspace", *[None] * 9, True)),
        (comet_ml.OfflineExperiment, ("project", "workspace", *[None] * 9, True)),
    ],
)
def test_disabled_by_position(kind, args):
    assert kind(*args).disabled


def test_comets_own_switch_disables(monkeypatch):
    monkeypatch.setenv("COMET_AUTO_LOG_DISABLE", "true")

    assert comet_ml.Experiment().disabled


def test_a_new_experiment_ends_the_one_before(experiment):
    second = comet_ml.Experiment()

    assert experiment.ended
    assert comet_ml.get_running_experiment() is second


def test_an_experiment_can_be_sent_to_a_worker(experiment):
    """A data set that holds it goes to spawned DataLoader workers by pickle."""
    arrived = pickle.loads(pickle.dumps(experiment))

    assert arrived.get_key() == experiment.get_key()
    assert "key-of-somebody" not in repr(vars(arrived))


def test_the_repr_shows_its_state(experiment):
    experiment.set_step(3)

    assert "step=3" in repr(experiment)
    assert experiment.get_key() in repr(experiment)


# -- start()


def test_start_goes_on_with_the_experiment_there_is(experiment):
    assert comet_ml.start() is experiment
    assert comet_ml.start(experiment_key=experiment.get_key(), mode="get") is experiment
    assert comet_ml.start(mode="create") is not experiment


def test_start_makes_the_kind_that_is_asked_for(run):
    assert type(comet_ml.start(project="x")) is comet_ml.Experiment
    assert type(comet_ml.start(online=False, mode="create")) is comet_ml.OfflineExperiment
    assert type(comet_ml.start(experiment_key="k" * 32)) is comet_ml.ExistingExperiment
    assert isinstance(comet_ml.get_running_experiment(), comet_ml.CometExperiment)


def test_start_takes_an_experiments_options(run):
    options = comet_ml.ExperimentConfig(name="mlp", tags=["ddp"])
    options.log_code = False
    experiment = comet_ml.start(experiment_config=options, source="a test")

    assert experiment.get_name() == "mlp"
    assert experiment.get_tags() == ["ddp"]
    assert experiment.get_other("Created from") == "a test"
    assert comet_ml.start(mode="create", experiment_config=comet_ml.ExperimentConfig(disabled=True)).disabled


def test_an_unknown_mode_is_refused(run):
    with pytest.raises(ConfigError, match="get_or_create"):
        comet_ml.start(mode="new")


def test_what_begins_and_ends_without_an_experiment():
    comet_ml.login(api_key="another-key-of-mine")
    comet_ml.init(project_name="x")
    comet_ml.init_onprem()
    comet_ml.error_mode()
    comet_ml.end()

    assert comet_ml.flush() is None
    assert comet_ml.get_running_experiment() is None
    assert config.hide("another-key-of-mine") == config.HIDDEN


# -- secrets


def test_no_api_key_is_logged_by_a_script_that_logs_all_its_arguments(experiment, run, monkeypatch):
    monkeypatch.setenv("COMET_API_KEY", "the-key-of-the-environment")
    keys = ("a-key-of-somebody", "the-key-of-the-environment")
    for key in keys:
        experiment.log_parameters({"api_key": key, "nested": {"words": [key]}})
        experiment.log_other("key", key)
        experiment.log_text(f"my key is {key}")
        experiment.send_notification(key, key, {"key": key})
        experiment.add_tag(key)
        experiment.set_name(key)
    run.flush()

    written = b"".join(path.read_bytes() for path in run._journal.folder.iterdir())
    assert config.HIDDEN.encode() in written
    assert not [key for key in keys if key.encode() in written]
