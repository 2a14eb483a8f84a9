"""Decides what becomes of Comet's calls that ddplog has no place for: accepted, counted, warned about once a name.

A script written for Comet must not end because of them. They return what Comet's would, so that code that looks into
the answer goes on: a dict with empty ids for what Comet uploads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Final

from ddplog.worker import current

_FILES: Final = "nothing is kept of it: ddplog keeps numbers, parameters and text"
_RECORD: Final = "nothing is kept of it: ddplog does not record code, packages or the model's graph"
_SERVER: Final = "it does nothing: ddplog does not talk to Comet's server"


def _asset() -> dict[str, str]:
    return {"web": "", "api": "", "assetId": ""}


def _image() -> dict[str, str]:
    return {"web": "", "api": "", "imageId": ""}


def _nothing() -> None:
    return None


class StandIn:
    """What Comet's objects are here: any method of theirs can be called, and nothing comes of it."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None  # noqa: ARG005 - anything

    def __repr__(self) -> str:
        return f"<ddplog.comet.{type(self).__name__}, kept nowhere>"


def stand_in(name: str) -> type[StandIn]:
    """Return a class of that name, which scripts make objects of, from any arguments."""

    def count(self: StandIn, *args: Any, **kwargs: Any) -> None:  # noqa: ARG001 - anything
        skip(name, _FILES)

    words = {"__module__": "ddplog.comet", "__doc__": f"Comet's {name}: {_FILES}.", "__init__": count}
    return type(name, (StandIn,), words)


METHODS: Final[dict[str, tuple[Callable[[], Any], str]]] = {
    "create_confusion_matrix": (StandIn, _FILES),
    "create_embedding_image": (_nothing, _FILES),
    "log_artifact": (_nothing, _FILES),
    "log_asset": (_asset, _FILES),
    "log_asset_data": (_asset, _FILES),
    "log_asset_folder": (list, _FILES),
    "log_audio": (_asset, _FILES),
    "log_confusion_matrix": (_asset, _FILES),
    "log_curve": (_asset, _FILES),
    "log_dataframe_profile": (_nothing, _FILES),
    "log_embedding": (_nothing, _FILES),
    "log_figure": (_image, _FILES),
    "log_histogram_3d": (_asset, _FILES),
    "log_image": (_image, _FILES),
    "log_model": (_asset, _FILES),
    "log_notebook": (_asset, _FILES),
    "log_optimization": (_nothing, _FILES),
    "log_points_3d": (_nothing, _FILES),
    "log_remote_asset": (_asset, _FILES),
    "log_remote_model": (_nothing, _FILES),
    "log_table": (_asset, _FILES),
    "log_tensorboard_folder": (_nothing, _FILES),
    "log_tensorflow_folder": (_nothing, _FILES),
    "log_video": (_asset, _FILES),
    "log_code": (list, _RECORD),
    "set_cmd_args": (_nothing, _RECORD),
    "set_code": (_nothing, _RECORD),
    "set_filename": (_nothing, _RECORD),
    "set_model_graph": (_nothing, _RECORD),
    "set_os_packages": (_nothing, _RECORD),
    "set_pip_packages": (_nothing, _RECORD),
    "create_symlink": (_nothing, _SERVER),
    "display": (_nothing, _SERVER),
    "display_project": (_nothing, _SERVER),
    "get_artifact": (_nothing, _SERVER),
    "get_callback": (StandIn, _SERVER),
    "get_hf_dataset": (list, _SERVER),
    "get_keras_callback": (StandIn, _SERVER),
    "register_callback": (_nothing, _SERVER),
    "register_model": (_nothing, _SERVER),
    "set_offline_zip_uploader": (_nothing, _SERVER),
    "unregister_callback": (_nothing, _SERVER),
}
"""Method of an experiment -> what makes its answer, and what the warning says."""

_warned: set[str] = set()


def skip(what: str, why: str) -> None:
    """Count and warn in the current run; before there is one, only warn."""
    if current.run is not None:
        current.run.skip(what, why)
    elif what not in _warned:
        _warned.add(what)
        warnings.warn(f"ddplog: {what}: {why}", RuntimeWarning, stacklevel=3)


def method(name: str) -> Callable[..., Any]:
    """Return the method of that name."""
    make, why = METHODS[name]

    def accept(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG001 - anything
        self.run.skip(f"{name}()", why)
        return make()

    accept.__name__ = name
    accept.__qualname__ = f"CometExperiment.{name}"
    accept.__doc__ = f"Accept Comet's call; {why}."
    return accept
