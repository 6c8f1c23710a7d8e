"""CIFAR-10, third stage: a ResNet-18 learns from the fine-tuned one, on all images without their labels.

Source: SimCLRv2 (https://arxiv.org/abs/2006.10029, section 3): self-distillation with a temperature of 0.1 (1
for a smaller student), crops and flips, unlabelled images alone, 400 epochs as in pretraining.
Command: python -m simclr_jax.distill --config configs/cifar10_distill.py
Before it: python -m simclr_jax.finetune --config configs/cifar10_finetune.py
Hardware, time, accuracy: not run. A smaller encoder on two CPU cores: configs/cifar10_cpu_distill.py.

A smaller student: --config.model.depth=10 --config.distill.temperature=1. One that begins with the pretrained
encoder: --config.start.run=runs/cifar10.
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "distill"
    config.distill.teacher = "runs/cifar10_finetune"
    config.distill.temperature = 0.1

    config.data.dataset = "cifar10"
    config.data.canvas_size = 32

    config.views.count = 1
    config.views.size = 32
    config.views.crop_area = (0.2, 1.0)
    config.views.jitter = 0.0
    config.views.grayscale = 0.0
    config.views.blur = 0.0

    config.model.depth = 18
    config.model.stem = "cifar"

    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.03
    config.optimizer.weight_decay = 5e-4

    config.train.epochs = 400
    config.train.batch_size = 512

    config.evaluation.dataset = "cifar10"
    return config
