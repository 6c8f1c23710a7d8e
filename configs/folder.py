"""Your own images: a folder of JPEG, PNG, WebP or BMP files, any depth, no labels.

Source: the paper's views and optimizer (https://arxiv.org/abs/2002.05709, appendix A and B; learning rate by
square root, which it found better below batches of 2,048) at 128 pixels.
Command: python -m simclr_jax.train --config configs/folder.py --config.data.folder=PATH --workdir runs/mine
Hardware, time, accuracy: depends on your images. The 1-NN at the end needs a labelled set; `shapes` is drawn
on the spot and says only that the encoder is sound. Set config.evaluation.dataset to one like your images.
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.data.folder = ""  # yours
    config.data.canvas_size = 192

    config.views.size = 128

    config.model.depth = 18
    config.model.head_hidden = 512
    config.model.head_out = 128

    config.loss.temperature = 0.2

    config.optimizer.name = "lars"
    config.optimizer.learning_rate = 0.075
    config.optimizer.scaling = "sqrt"
    config.optimizer.weight_decay = 1e-6
    config.optimizer.warmup_epochs = 10.0

    config.train.epochs = 200
    config.train.batch_size = 256

    config.evaluation.dataset = "shapes"
    return config
