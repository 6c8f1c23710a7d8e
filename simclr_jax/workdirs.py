"""A run's folder: which run it holds, and whether that run is finished."""

import json
import os
from typing import Any

from simclr_jax import config, logs, paths
from simclr_jax.config import Config
from simclr_jax.errors import UserError

_CONFIG = "config.json"
_RESULT = "result.json"
_LABELS = "labels.json"


def check(workdir: paths.Path, settings: Config) -> None:
    """Raises `UserError` where `workdir` cannot hold the run of `settings`; writes nothing.

    It can be absent, empty, or hold an earlier part of the same run: keys of the config may differ in
    `run.*` only.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    if not paths.is_remote(workdir):
        parent = next(folder for folder in (workdir, *workdir.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise UserError(f"--workdir {workdir} cannot be written; name another folder")
    file = workdir / _CONFIG
    if file.exists():
        # Keys that are newer than the run had their defaults in it.
        defaults, stored = _as_json(config.default_config()), json.loads(file.read_text())
        then = config.flatten(defaults) | config.current(stored)
        differing = config.differing_keys(then, _as_json(settings))
        if differing:
            raise UserError(
                f"{workdir} holds a run of a different config: {', '.join(differing)}; "
                "go on with its values or set another --workdir"
            )
    elif workdir.exists() and any(path.name != _CONFIG + ".partial" for path in paths.entries(workdir)):
        raise UserError(f"--workdir {workdir} holds files but no run; name a new or empty folder")


def create(workdir: paths.Path, settings: Config, labels: dict[str, Any] | None = None) -> None:
    """Makes the folder, with the resolved config in it, and what labels the run learns from, if any."""
    paths.make_folder(workdir)
    if labels is not None:
        logs.write_json(workdir / _LABELS, labels)
    logs.write_json(workdir / _CONFIG, _as_json(settings))


def read_config(workdir: paths.Path) -> Config:
    """The config of the run in `workdir`; keys that came after it have their defaults.

    Raises `UserError` where there is no run, or one of a later version.
    """
    file = workdir / _CONFIG
    if not file.exists():
        raise UserError(f"{workdir} holds no run; name the --workdir of python -m simclr_jax.train")
    settings = config.default_config()
    known = config.flatten(settings)
    for key, value in config.current(json.loads(file.read_text())).items():
        if key not in known:
            raise UserError(f"{file} has a key {key}, which this version does not know")
        section, _, name = key.rpartition(".")
        (settings[section] if section else settings)[name] = value
    config.check(settings)
    return settings


def read_labels(workdir: paths.Path) -> dict[str, Any] | None:
    """What labels the run learned from; None of a pretrained run."""
    file = workdir / _LABELS
    return json.loads(file.read_text()) if file.exists() else None


def read_result(workdir: paths.Path) -> dict[str, Any] | None:
    """What a finished run left; None where the run is not finished."""
    file = workdir / _RESULT
    return json.loads(file.read_text()) if file.exists() else None


def write_result(workdir: paths.Path, result: dict[str, Any]) -> None:
    """Marks the run as finished."""
    logs.write_json(workdir / _RESULT, result)


def _as_json(settings: Config) -> dict[str, Any]:
    return json.loads(settings.to_json())  # a round trip, so that tuples compare as JSON's lists
