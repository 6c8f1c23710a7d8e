"""CIFAR-10 on two CPU cores, third stage: a student learns from the run of configs/cifar10_cpu_finetune.py.

Source: SimCLRv2 (https://arxiv.org/abs/2006.10029, section 3), self-distillation without labels. The student
begins with the pretrained encoder, as these are few steps.
Command: python -m simclr_jax.distill --config configs/cifar10_cpu_distill.py
Before it: python -m simclr_jax.finetune --config configs/cifar10_cpu_finetune.py
Hardware, time, accuracy: two CPU cores, 10 minutes, top-1 60.4 % from a teacher of 60.2 %, on
JPEG-re-encoded CIFAR-10 (47.9 % from a teacher of 47.9 %, with 1 % of the labels).
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "distill"
    config.distill.teacher = "runs/cifar10_cpu_finetune"
    config.start.run = "runs/cifar10_cpu"

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

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 1e-4

    config.train.epochs = 8
    config.train.batch_size = 128

    config.evaluation.dataset = "cifar10"
    return config
