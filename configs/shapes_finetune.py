"""Shapes, second stage: fine-tunes the encoder of configs/shapes.py on 1 % of the labels, 4 of each class.

TODO
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "finetune"
    config.start.run = "runs/shapes"
    config.labels.fraction = 0.01

    config.data.dataset = "shapes"
    config.data.canvas_size = 32

    config.views.count = 1
    config.views.size = 48
    config.views.crop_area = (0.6, 1.0)
    config.views.jitter = 0.0
    config.views.grayscale = 0.0
    config.views.blur = 0.0

    config.model.depth = 10
    config.model.width = 0.25
    config.model.stem = "imagenet"
    config.model.head_layers = 1
    config.model.head_out = 64
    config.model.head_norm = "none"

    config.classifier.start = "probe"
    config.classifier.encoder_rate = 1.0
    config.classifier.batch_norm = "running"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 0.0

    config.train.steps = 200
    config.train.batch_size = 40

    config.evaluation.dataset = "shapes"
    return config
