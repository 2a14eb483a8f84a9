"""Prints the public interface of the comet_ml that is installed, as JSON: `python signatures.py > data/signatures.json`.

Run in a process of its own: comet_ml patches what is imported after it.
"""

import inspect
import json
import os

os.environ["COMET_ERROR_TRACKING_ENABLE"] = "false"
os.environ["COMET_DISABLE_AUTO_LOGGING"] = "1"

import comet_ml
import comet_ml.integration.pytorch

CLASSES = ("CometExperiment", "Experiment", "ExistingExperiment", "OfflineExperiment", "ExistingOfflineExperiment")
FUNCTIONS = ("start", "init", "login", "init_onprem", "get_experiment_key", "get_running_experiment",
             "get_global_experiment", "get_config", "error_mode", "end", "flush")  # fmt: skip


def parameters(function):
    """Return [name, kind, default as it prints or None] of each parameter but self."""
    return [
        [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
        for p in inspect.signature(function).parameters.values()
        if p.name != "self"
    ]


def methods(kind):
    return {
        name: parameters(value) if callable(value := getattr(kind, name)) else None
        for name in sorted(dir(kind))
        if not name.startswith("_")
    }


RECORD = {
    "version": comet_ml.__version__,
    "names": sorted(comet_ml.__all__),
    "constructors": {name: parameters(getattr(comet_ml, name).__init__) for name in CLASSES},
    "config": parameters(comet_ml.ExperimentConfig.__init__),
    "functions": {name: parameters(getattr(comet_ml, name)) for name in FUNCTIONS},
    "methods": methods(comet_ml.Experiment),
    "offline_methods": sorted(methods(comet_ml.OfflineExperiment)),
    "pytorch": {
        name: parameters(getattr(comet_ml.integration.pytorch, name)) for name in ("load_model", "log_model", "watch")
    },
}


def lines(value):
    """Return JSON with one line for each entry, so that a newer version's differences can be read."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{\n" + ",\n".join(f"{json.dumps(name)}: {lines(entry)}" for name, entry in value.items()) + "\n}"


print(lines(RECORD))
