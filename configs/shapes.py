"""Shapes drawn by the package: the five-minute proof that an installation learns, with no download.

Source: ours; the paper's recipe (https://arxiv.org/abs/2002.05709) shrunk to two CPU cores.
Command: python -m simclr_jax.train --config configs/shapes.py
"""

from ml_collections import ConfigDict

from simclr_jax.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.data.dataset = "shapes"
    config.data.canvas_size = 32

    config.views.size = 32
    config.views.crop_area = (0.4, 1.0)
    config.views.brightness = 0.4
    config.views.contrast = 0.4
    config.views.saturation = 0.4
    config.views.hue = 0.1
    config.views.blur = 0.0

    config.model.depth = 10
    config.model.width = 0.25
    config.model.stem = "cifar"
    config.model.head_hidden = 128
    config.model.head_out = 64

    config.loss.temperature = 0.2

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 1.0

    config.train.epochs = 20
    config.train.batch_size = 256

    config.evaluation.dataset = "shapes"
    return config
