"""Decides what Comet's own settings mean here, and keeps its API key out of what is logged.

Comet's setting `comet.project_name` is the variable COMET_PROJECT_NAME, and so on. `.comet.config` is not read. The key
is needed for nothing: it stays in this process's memory, only to be recognised where a script logs all its arguments.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from typing import Any, Final

from ddplog.config import resolve

HIDDEN: Final = "********"
NO_KEY: Final = "no-key-is-needed-with-ddplog"
"""What a script that looks for a key gets where there is none."""

_OWN_KEY: Final = "ddplog"
_MIN_KEY_CHARS: Final = 8
"""A shorter word is no key, and would be struck out of ordinary text."""

_TRUE: Final = ("1", "true", "yes", "on")

_given_keys: set[str] = set()


def get_setting(name: str) -> str | None:
    """Return a setting of Comet's, such as comet.project_name, from the environment; None if it is not set."""
    return os.environ.get(name.upper().replace(".", "_")) or None


def is_set(name: str) -> bool:
    """Whether a switch of Comet's is on in the environment."""
    return (get_setting(name) or "").lower() in _TRUE


class Config:
    """Comet's settings as scripts look at them: config["comet.project_name"]."""

    def __getitem__(self, name: str) -> Any:
        return get_config(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a setting, or the default."""
        value = get_config(name)
        return default if value is None else value

    def __repr__(self) -> str:
        return "<ddplog.comet settings from COMET_*>"  # and never their values: the key is one


def get_config(setting: str | None = None) -> Any:
    """Return a setting of Comet's, or all of them."""
    if setting is None:
        return Config()
    return get_setting(setting) or (NO_KEY if setting == "comet.api_key" else None)


def get_api_key(api_key: str | None = None, config: object = None) -> str:  # noqa: ARG001 - Comet's signature
    """Return the key, or a word that says that none is needed."""
    return api_key or str(get_config("comet.api_key"))


def hide_from_now_on(api_key: Any) -> None:
    """Remember a key that was passed as an argument, so that hide() knows it."""
    if isinstance(api_key, str) and len(api_key) >= _MIN_KEY_CHARS:
        _given_keys.add(api_key)


def hide(text: str) -> str:
    """Return the text without any API key that this process knows."""
    key = os.environ.get("COMET_API_KEY", "")
    for known in (*_given_keys, *([key] if len(key) >= _MIN_KEY_CHARS else [])):
        text = text.replace(known, HIDDEN)
    return text


def get_experiment_key(user_input: str | bytes | Mapping[str, Any] | None) -> str:
    """Return the key that Comet makes of something: the same one for the same input; a random one for None."""
    if user_input is None:
        return uuid.uuid4().hex
    if isinstance(user_input, bytes):
        user_input = user_input.decode()
    elif isinstance(user_input, Mapping):
        user_input = json.dumps(user_input, sort_keys=True, default=str)
    return hashlib.sha1(str(user_input).encode(), usedforsecurity=False).hexdigest()


def find_key(given: Mapping[str, Any]) -> str | None:
    """Return the experiment key that a script asks for, if it does."""
    key = given.get("experiment_key") or given.get("previous_experiment") or get_setting("comet.experiment_key")
    return None if key is None else str(key)


def make_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what ddplog.init() is to be called with.

    As with init(), what the script says about the project and the name wins over ddplog's settings, and Comet's variables
    only count where those say nothing. An experiment key names the run, so that it is found again by it; not where
    ddplog's settings name it, and not where it is the key of the job's own run, which another rank has passed on.

    Args:
        given: The arguments of an experiment's constructor.
    """
    origins = resolve().origins
    settings: dict[str, Any] = {"name": given.get("name")}
    project, key = given.get("project_name"), find_key(given)
    if project is None and origins["project"] == "default":
        project = get_setting("comet.project_name")
    if project is not None:
        settings["project"] = as_project(str(project))
    if key is not None and not is_key_of_run(key) and origins["run_id"] == "default":
        settings["run_id"] = key
    return settings


def key_of_run(run_id: str) -> str:
    """Return the experiment key of a run that was given none: 40 letters and digits, as Comet wants them."""
    return (_OWN_KEY + get_experiment_key(run_id))[:40]


def is_key_of_run(key: str) -> bool:
    """Whether a key is one of key_of_run(): a rank that got it from another rank means the job's own run."""
    return key.startswith(_OWN_KEY)


def as_project(name: str) -> str:
    """Return a project's name as ddplog takes it: Comet's may have spaces."""
    return re.sub(r"[^A-Za-z0-9_.\-]+", "-", name).lstrip("._-")[:100] or "default"
