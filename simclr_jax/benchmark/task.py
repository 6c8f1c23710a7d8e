"""What a process with PyTorch is told to train, without a type of JAX or of PyTorch."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class Task(NamedTuple):
    """A recipe."""

    config: Mapping[str, Any]  # nested dicts, as of `Config.to_dict`
    classes: int  # width of the logits; 0 for pretraining
    learning_rate: float  # at the first step
    total_steps: int  # of the cosine
    blur_kernel: int  # side of the blur's kernel, pixels


class Images(NamedTuple):
    """A pack, as a process of its own opens it."""

    canvas: str  # file with uint8 [N, S, S, 3], as of `numpy.save`
    extent: np.ndarray  # int32 [N, 2], height and width of each image, which lies at the top left
    label: np.ndarray  # int32 [N]

    def open_canvas(self) -> np.ndarray:
        """The pixels, memory-mapped."""
        return np.load(self.canvas, mmap_mode="r")
