"""Shapes, third stage: a student learns from the fine-tuned run what all images are, without their labels.

Source: SimCLRv2 (https://arxiv.org/abs/2006.10029, section 3), self-distillation. The student begins with the
pretrained encoder, as these are few steps, and the views keep the colour changes of configs/shapes.py.
Command: python -m simclr_jax.distill --config configs/shapes_distill.py
Before it: python -m simclr_jax.finetune --config configs/shapes_finetune.py
Hardware, time, accuracy: two cores of a Xeon at 2.3 GHz, 54 s, top-1 60.7 % from a teacher of 59.7 % (labels
of seed 0; with sums in another order 61.1 from 60.5 and 63.9 from 64.6 %, and 53.3 and 55.5 from 52.0 and
55.0 % with those of 1 and 2).
"""

from simclr_jax.config import Config, default_config


def get_config() -> Config:
    config = default_config()
    config.stage = "distill"
    config.distill.teacher = "runs/shapes_finetune"
    config.distill.temperature = 1.0
    config.start.run = "runs/shapes"

    config.data.dataset = "shapes"
    config.data.canvas_size = 32

    config.views.count = 1
    config.views.size = 48
    config.views.crop_area = (0.6, 1.0)
    config.views.brightness = 0.6
    config.views.contrast = 0.6
    config.views.saturation = 1.0
    config.views.hue = 0.5
    config.views.grayscale = 0.5
    config.views.blur = 0.0

    config.model.depth = 10
    config.model.width = 0.25
    config.model.stem = "imagenet"
    config.model.head_layers = 1
    config.model.head_out = 64
    config.model.head_norm = "none"

    config.optimizer.name = "adamw"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.scaling = "none"
    config.optimizer.weight_decay = 1e-4

    config.train.epochs = 15
    config.train.batch_size = 64

    config.evaluation.dataset = "shapes"
    return config
