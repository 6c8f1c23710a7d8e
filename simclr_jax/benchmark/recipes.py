"""The recipes that benchmarks measure: that of `--config`, or those of this checkout."""

import pathlib
import re
import runpy
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from simclr_jax import command
from simclr_jax import config as configs
from simclr_jax.config import Config
from simclr_jax.errors import UserError

FOLDER = pathlib.Path(__file__).parents[2] / "configs"


def define(flag_values: flags.FlagValues) -> None:
    """Adds `--config` and `--config.KEY=VALUE`."""
    config_flags.DEFINE_config_file("config", None, "Recipe.", lock_config=True, flag_values=flag_values)


def with_default(argv: Sequence[str], name: str) -> list[str]:
    """The command line `argv`, with `--config` for the recipe of this `name` where it has none.

    Keys can be set only after the recipe is known, so it goes before all other flags. Of a package that was
    installed without the folder of recipes there is nothing to name, and `read` asks for one.
    """
    file = FOLDER / name
    named = any(re.match(r"--?config(=|$)", argument) for argument in argv)
    return [*argv] if named or not file.is_file() else [argv[0], f"--config={file}", *argv[1:]]


def read(flag_values: flags.FlagValues) -> Config:
    """The checked recipe, for pretraining. Raises `UserError` where there is none, or it cannot be used."""
    command.config_file(flag_values)
    settings = flag_values["config"].value
    configs.check(settings, stage="pretrain")
    return settings


def of_checkout(name: str) -> Config:
    """The recipe of this name, unchecked. Raises `UserError` where the package is without that folder."""
    file = FOLDER / name
    if not file.is_file():
        raise UserError(f"there is no {file}; run this in a clone of the repository, which has the recipes")
    return runpy.run_path(str(file))["get_config"]()
