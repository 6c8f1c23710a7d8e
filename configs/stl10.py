"""STL-10: its 100,000 unlabelled images at 96 pixels with a ResNet-18, 1-NN on its labelled ones.

Source: the UvA deep learning tutorial 17
(https://uvadlc-notebooks.readthedocs.io/en/latest/tutorial_notebooks/JAX/tutorial17/SimCLR.html): AdamW 5e-4,
temperature 0.07, jitter 0.5/0.5/0.5/0.1, 500 epochs; a linear probe on all labels gave theirs 81.05 %. Ours
crops on the device and blurs half of the views, as the paper does; theirs blurs all.
Command: python -m simclr_jax.train --config configs/stl10.py
Data, once: pip install -e '.[prepare]' && python -m simclr_jax.prepare stl10
Hardware, time, accuracy: not run.
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.data.dataset = "stl10"
    config.data.split = "unlabelled"
    config.data.canvas_size = 96

    config.views.size = 96
    config.views.brightness = 0.5
    config.views.contrast = 0.5
    config.views.saturation = 0.5
    config.views.hue = 0.1
    config.views.mean = (0.5, 0.5, 0.5)
    config.views.std = (0.5, 0.5, 0.5)
    config.views.dtype = "bfloat16"

    config.model.depth = 18
    config.model.dtype = "bfloat16"
    config.model.head_layers = 2
    config.model.head_hidden = 512
    config.model.head_out = 128
    config.model.head_norm = "none"

    config.loss.temperature = 0.07

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 5e-4
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 1e-4
    config.optimizer.final_fraction = 0.02

    config.train.epochs = 500
    config.train.batch_size = 256

    config.evaluation.dataset = "stl10"
    config.evaluation.canvas_size = 96
    return config
