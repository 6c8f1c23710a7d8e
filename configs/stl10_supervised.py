"""STL-10 with labels alone: the supervised baseline, a ResNet-18 from scratch on its 5,000 labelled images.

Source: the UvA deep learning tutorial 17
(https://uvadlc-notebooks.readthedocs.io/en/latest/tutorial_notebooks/JAX/tutorial17/SimCLR.html), whose
baseline reaches 71.64 %: weaker views than SimCLR's, as for classes colour counts and the object has to be
seen whole: crops of at least 0.8 of the area, flips, grayscale, a light blur, no colour jitter; 100 epochs of
batches of 64.
Command: python -m simclr_jax.finetune --config configs/stl10_supervised.py
Data, once: pip install -e '.[prepare]' && python -m simclr_jax.prepare stl10
Hardware, time, accuracy: not run.

With --config.start.run=runs/stl10 it fine-tunes the encoder of configs/stl10.py instead.
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "finetune"
    config.data.dataset = "stl10"
    config.data.canvas_size = 96

    config.views.count = 1
    config.views.size = 96
    config.views.crop_area = (0.8, 1.0)
    config.views.jitter = 0.0
    config.views.blur = 1.0
    config.views.blur_sigma = (0.1, 0.5)
    config.views.mean = (0.5, 0.5, 0.5)
    config.views.std = (0.5, 0.5, 0.5)
    config.views.dtype = "bfloat16"

    config.model.depth = 18
    config.model.dtype = "bfloat16"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 2e-4

    config.train.epochs = 100
    config.train.batch_size = 64

    config.evaluation.dataset = "stl10"
    config.evaluation.canvas_size = 96
    return config
