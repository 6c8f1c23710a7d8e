"""CIFAR-10 with labels on two CPU cores: fine-tunes the encoder of configs/cifar10_cpu.py.

TODO
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "finetune"
    config.start.run = "runs/cifar10_cpu"
    config.labels.fraction = 0.1

    config.data.dataset = "cifar10"
    config.data.canvas_size = 32

    config.views.count = 1
    config.views.size = 40
    config.views.crop_area = (0.2, 1.0)
    config.views.jitter = 0.0
    config.views.grayscale = 0.0
    config.views.blur = 0.0

    config.model.depth = 10
    config.model.width = 0.5
    config.model.stem = "imagenet"
    config.model.head_hidden = 256
    config.model.head_out = 64

    config.classifier.start = "probe"
    config.classifier.batch_norm = "running"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 1e-4

    config.train.epochs = 30
    config.train.batch_size = 128

    config.evaluation.dataset = "cifar10"
    return config
