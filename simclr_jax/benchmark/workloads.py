"""What the benchmark of training trains: recipes with the images they see."""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from simclr_jax import config as configs
from simclr_jax import recipe
from simclr_jax.benchmark import recipes
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError


class Workload(NamedTuple):
    """A recipe, and how much of it is measured."""

    about: str  # what it is, for people
    recipe: str  # file of configs/
    changes: Mapping[str, Any]  # of the recipe, by key
    images: int  # of noise, where the data set is not prepared
    batch: int  # images a step
    batch_on_cpu: int

    def config(self, *, on_cpu: bool, batch: int | None = None) -> Config:
        """The checked recipe: in bfloat16 on an accelerator, in float32 on a CPU.

        Args:
          on_cpu: where it is measured.
          batch: images a step; by default the workload's own.

        Raises:
          UserError: for a batch that is out of range, or where there is no folder of recipes.
        """
        config = recipes.of_checkout(self.recipe)
        dtype = "float32" if on_cpu else "bfloat16"
        config.update_from_flattened_dict(
            {
                "views.dtype": dtype,
                "model.dtype": dtype,
                "train.batch_size": batch or (self.batch_on_cpu if on_cpu else self.batch),
                **self.changes,
            }
        )
        configs.check(config)
        return config


_SMALL = {"views.size": 128, "data.canvas_size": 160}
_RESNET50 = {"model.depth": 50, "model.head_hidden": 2048, "model.passes": "joint"}

WORKLOADS: Mapping[str, Workload] = {
    "cifar10": Workload("SimCLR, ResNet-18 with 3x3 stem", "cifar10.py", {}, 50_000, 512, 64),
    "stl10": Workload("SimCLR, ResNet-18", "stl10.py", {}, 10_000, 256, 32),
    "imagenette128": Workload("SimCLR, ResNet-18", "imagenette.py", _SMALL, 4_096, 256, 32),
    "imagenette224": Workload("SimCLR, ResNet-18", "imagenette.py", {}, 2_048, 256, 16),
    "resnet50": Workload("SimCLR, ResNet-50", "imagenette.py", _RESNET50, 2_048, 256, 8),
    "supervised": Workload("supervised, ResNet-18", "stl10_supervised.py", {}, 5_000, 64, 32),
}
ON_CPU = ("cifar10", "imagenette128")  # those that a CPU measures in minutes


class Data(NamedTuple):
    """The images of a workload."""

    pack: Pack
    file: str  # with the pixels, as of `numpy.save`, for processes without JAX
    about: str  # what they are, and why where they are not real


def noise(images: int, side: int) -> Pack:
    """So many images of uint8 noise, each filling its canvas, of ten classes in turn."""
    return Pack(
        canvas=np.random.default_rng(0).integers(0, 256, (images, side, side, 3), np.uint8),
        extent=np.full((images, 2), side, np.int32),
        label=(np.arange(images) % 10).astype(np.int32),
        class_names=tuple(map(str, range(10))),
        name="noise",
        unreadable=0,
    )


@contextlib.contextmanager
def open_images(config: Config, images: int) -> Iterator[Data]:
    """The data set of a recipe where TFDS has it prepared, or else `noise`, so many images.

    Noise lies in a temporary file for as long as the context.
    """
    try:
        pack = recipe.open_data(config)
    except UserError as error:
        made = noise(images, config.data.canvas_size)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "canvas.npy"
            np.save(path, made.canvas)
            pack = dataclasses.replace(made, canvas=np.load(path, mmap_mode="r"))
            yield Data(pack, str(path), f"{made.name}, as {error}")
    else:
        yield Data(pack, str(getattr(pack.canvas, "filename", "")), pack.name)
