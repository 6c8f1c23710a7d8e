"""Imagenette at 224 pixels with a ResNet-18, judged by 1-NN on CIFAR-10: what it learned on other images.

Source: the paper's views (https://arxiv.org/abs/2002.05709, appendix A: area from 0.08, jitter of strength 1,
blur) with the optimizer, head and temperature of lightly's Imagenette benchmark
(https://docs.lightly.ai/self-supervised-learning/getting_started/benchmarks.html), which uses 128 pixels and
reaches a k-NN accuracy on Imagenette itself of 0.835 after 200 epochs (theirs, best epoch).
Command: python -m simclr_jax.train --config configs/imagenette.py
Data, once: pip install -e '.[prepare]' && python -m simclr_jax.prepare imagenette/320px-v2 && python -m
simclr_jax.prepare cifar10
Hardware, time, accuracy: in full, not run.
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.data.dataset = "imagenette/320px-v2"
    config.data.canvas_size = 320

    config.views.size = 224
    config.views.mean = (0.485, 0.456, 0.406)
    config.views.std = (0.229, 0.224, 0.225)
    config.views.dtype = "bfloat16"

    config.model.depth = 18
    config.model.dtype = "bfloat16"
    config.model.head_layers = 2
    config.model.head_hidden = 512
    config.model.head_out = 128
    config.model.head_norm = "hidden"
    config.model.passes = "separate"

    config.loss.temperature = 0.5

    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.06
    config.optimizer.scaling = "linear"
    config.optimizer.weight_decay = 5e-4
    config.optimizer.decay = "all"

    config.train.epochs = 200
    config.train.batch_size = 256

    config.evaluation.dataset = "cifar10"
    return config
