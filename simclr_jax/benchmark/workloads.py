"""What the benchmark of training trains: recipes with the images they see."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from simclr_jax import config as configs
from simclr_jax import recipe
from simclr_jax.config import Config, default_config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError

_IMAGENET = {"views.mean": (0.485, 0.456, 0.406), "views.std": (0.229, 0.224, 0.225)}
_HALF = {"views.mean": (0.5, 0.5, 0.5), "views.std": (0.5, 0.5, 0.5)}
_JITTER = {"views.brightness": 0.5, "views.contrast": 0.5, "views.saturation": 0.5, "views.hue": 0.1}
_SGD = {"optimizer.learning_rate": 0.06, "optimizer.weight_decay": 5e-4, "optimizer.decay": "all"}
_ADAMW = {"optimizer.name": "adamw", "optimizer.scaling": "none"}

_CIFAR10 = {
    "data.dataset": "cifar10",
    "views.crop_area": (0.2, 1.0),
    "views.brightness": 0.4,
    "views.contrast": 0.4,
    "views.saturation": 0.4,
    "views.hue": 0.1,
    "views.grayscale": 0.1,
    "views.blur": 0.0,
    "model.stem": "cifar",
    "model.head_hidden": 1024,
    "model.head_norm": "none",
    "model.passes": "separate",
    "optimizer.learning_rate": 0.03,
    "optimizer.weight_decay": 5e-4,
    "optimizer.decay": "all",
    "train.epochs": 1000,
}
_STL10 = {
    "data.dataset": "stl10",
    "data.split": "unlabelled",
    **_HALF,
    **_JITTER,
    **_ADAMW,
    "model.head_norm": "none",
    "loss.temperature": 0.07,
    "optimizer.learning_rate": 5e-4,
    "optimizer.weight_decay": 1e-4,
    "optimizer.final_fraction": 0.02,
    "train.epochs": 500,
}
_IMAGENETTE = {
    "data.dataset": "imagenette/320px-v2",
    **_IMAGENET,
    **_SGD,
    "model.passes": "separate",
    "train.epochs": 200,
}
_RESNET50 = _IMAGENETTE | {"model.depth": 50, "model.head_hidden": 2048, "model.passes": "joint"}
_SUPERVISED = {
    "stage": "finetune",
    "data.dataset": "stl10",
    "views.count": 1,
    "views.crop_area": (0.8, 1.0),
    "views.jitter": 0.0,
    "views.blur": 1.0,
    "views.blur_sigma": (0.1, 0.5),
    **_HALF,
    **_ADAMW,
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 2e-4,
}


class Workload(NamedTuple):
    """A recipe, and how much of it is measured."""

    about: str  # what it is, for people
    changes: Mapping[str, Any]  # of `default_config`, by key
    canvas: int  # side of the packed images, pixels
    side: int  # of the views, pixels
    images: int  # of noise, where the data set is not prepared
    batch: int  # images a step
    batch_on_cpu: int

    def config(self, *, on_cpu: bool, batch: int | None = None) -> Config:
        """The checked recipe: in bfloat16 on an accelerator, in float32 on a CPU.

        Args:
          on_cpu: where it is measured.
          batch: images a step; by default the workload's own.

        Raises:
          UserError: for a batch that is out of range.
        """
        config = default_config()
        dtype = "float32" if on_cpu else "bfloat16"
        config.update_from_flattened_dict(
            {
                "data.canvas_size": self.canvas,
                "views.size": self.side,
                "views.dtype": dtype,
                "model.dtype": dtype,
                "train.batch_size": batch or (self.batch_on_cpu if on_cpu else self.batch),
                **self.changes,
            }
        )
        configs.check(config)
        return config


WORKLOADS: Mapping[str, Workload] = {
    "cifar10": Workload("SimCLR, ResNet-18 with 3x3 stem", _CIFAR10, 32, 32, 50_000, 512, 64),
    "stl10": Workload("SimCLR, ResNet-18", _STL10, 96, 96, 10_000, 256, 32),
    "imagenette128": Workload("SimCLR, ResNet-18", _IMAGENETTE, 160, 128, 4_096, 256, 32),
    "imagenette224": Workload("SimCLR, ResNet-18", _IMAGENETTE, 320, 224, 2_048, 256, 16),
    "resnet50": Workload("SimCLR, ResNet-50", _RESNET50, 320, 224, 2_048, 256, 8),
    "supervised": Workload("supervised, ResNet-18", _SUPERVISED, 96, 96, 5_000, 64, 32),
}
ON_CPU = ("cifar10", "imagenette128")  # those that a CPU measures in minutes


class Data(NamedTuple):
    """The images of a workload."""

    pack: Pack
    file: str  # with the pixels, as of `numpy.save`, for processes without JAX
    about: str  # what they are, and why where they are not real


@contextlib.contextmanager
def open_images(config: Config, images: int) -> Iterator[Data]:
    """The data set of a recipe where TFDS has it prepared, or else so many images of uint8 noise.

    Noise lies in a temporary file for as long as the context.
    """
    try:
        pack = recipe.open_data(config)
    except UserError as error:
        side = config.data.canvas_size
        rng = np.random.default_rng(0)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "canvas.npy"
            np.save(path, rng.integers(0, 256, (images, side, side, 3), np.uint8))
            pack = Pack(
                canvas=np.load(path, mmap_mode="r"),
                extent=np.full((images, 2), side, np.int32),
                label=(np.arange(images) % 10).astype(np.int32),
                class_names=tuple(map(str, range(10))),
                name="noise",
                unreadable=0,
            )
            yield Data(pack, str(path), f"noise, as {error}")
    else:
        yield Data(pack, str(getattr(pack.canvas, "filename", "")), pack.name)
