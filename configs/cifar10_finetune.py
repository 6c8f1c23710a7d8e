"""CIFAR-10, second stage: fine-tunes the ResNet-18 of configs/cifar10.py on 10 % of the labels.

Source: SimCLRv2 (https://arxiv.org/abs/2006.10029, section 3): crops and flips only, no weight decay, no
warm-up, LARS with a learning rate of 0.005 times the square root of the batch, far below that of pretraining;
30 epochs, 60 with 1 % of the labels.
Command: python -m simclr_jax.finetune --config configs/cifar10_finetune.py
Before it: python -m simclr_jax.train --config configs/cifar10.py
Hardware, time, accuracy: not run. A smaller encoder on two CPU cores: configs/cifar10_cpu_finetune.py.

1 %: --config.labels.fraction=0.01 --config.train.epochs=60. From the first layer of the projection head, as
the paper does with few labels and heads of three layers: --config.classifier.head_layer=1.
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "finetune"
    config.start.run = "runs/cifar10"
    config.labels.fraction = 0.1

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
    config.model.head_layers = 2
    config.model.head_hidden = 1024
    config.model.head_out = 128
    config.model.head_norm = "none"

    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.005
    config.optimizer.scaling = "sqrt"
    config.optimizer.weight_decay = 0.0

    config.train.epochs = 30
    config.train.batch_size = 256

    config.evaluation.dataset = "cifar10"
    return config
