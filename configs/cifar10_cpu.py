"""CIFAR-10 in half an hour on two CPU cores: a ResNet-10 of half width, to see real images being learned.

Source: the views of configs/cifar10.py, shrunk as configs/shapes.py is: the ImageNet stem on views of 40
pixels at half width costs a CPU half of what the 3x3 stem costs on 32 at quarter width.
Command: python -m simclr_jax.train --config configs/cifar10_cpu.py
Hardware, time, accuracy: two CPU cores (Xeon, 2.8 GHz), 20 minutes, 1-NN 50.0 % on JPEG-re-encoded CIFAR-10,
where raw pixels reach 36.7 % and the untrained encoder 26.5 % (one run, seed 0).
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.data.dataset = "cifar10"
    config.data.canvas_size = 32

    config.views.size = 40
    config.views.crop_area = (0.2, 1.0)
    config.views.brightness = 0.4
    config.views.contrast = 0.4
    config.views.saturation = 0.4
    config.views.hue = 0.1
    config.views.blur = 0.0

    config.model.depth = 10
    config.model.width = 0.5
    config.model.stem = "imagenet"
    config.model.head_hidden = 256
    config.model.head_out = 64

    config.loss.temperature = 0.2

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.warmup_epochs = 0.25

    config.train.epochs = 8
    config.train.batch_size = 128

    config.evaluation.dataset = "cifar10"
    return config
