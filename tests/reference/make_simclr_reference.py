"""Writes the outputs of SimCLRv2's own encoders, for tests/test_resnet.py.

Run by hand from tests/, with a clone of google-research/simclr (made with its commit 383d414,
tensorflow-cpu 2.21.0 and tf_keras 2.21.0):

    python -m reference.make_simclr_reference CLONE

Weights and images are not stored: both sides draw them by name, as for the reference of torchvision.
"""

# pyright: reportMissingImports=false, reportMissingModuleSource=false

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from reference.make_torch_reference import BATCH, HERE, draw, draw_weight

BLOCKS = (2, 1, 1, 1)  # in the stages: one of each kind


class Case(NamedTuple):
    """An encoder, in the words of our ResNet but for its number of blocks."""

    bottleneck: bool
    width: float
    stem: str
    attention: str
    pixels: int


CASES = {
    "sk_resnet_d": Case(True, 0.125, "resnet-d", "sk", 64),
    "se_resnet_d": Case(False, 0.25, "resnet-d", "se", 64),
    "se_cifar": Case(True, 0.125, "cifar", "se", 16),
}


def draw_images(name: str) -> np.ndarray:
    """The images of a case, each of a contrast and a colour of its own.

    Where they are as alike as noise is, the BatchNorms of selective kernels, of one mean per image, multiply
    rounding five times as much as here.
    """
    pixels = CASES[name].pixels
    contrast = np.exp(0.5 * draw(f"{name} contrast", (BATCH, 1, 1, 1)))
    return contrast * draw(name, (BATCH, pixels, pixels, 3)) + draw(f"{name} colour", (BATCH, 1, 1, 3))


def plain(layers: list) -> list:
    """The Keras layers of the convolutions and BatchNorms among the original's, which alternate."""
    layers = [getattr(layer, "conv2d", getattr(layer, "bn", None)) for layer in layers]
    return [layer for layer in layers if layer is not None]


def named_layers(encoder: Any) -> dict[str, Any]:
    """Every Keras layer with variables, by its name in torchvision or one in the same style."""
    named = {}

    def name_pairs(layers: list, conv: str, norm: str) -> None:
        for i in range(len(layers) // 2):
            named[conv.format(i + 1)], named[norm.format(i + 1)] = layers[2 * i : 2 * i + 2]

    stem = plain(encoder.initial_conv_relu_max_pool)
    name_pairs(stem[:-2], "first_conv{}", "first_bn{}")
    name_pairs(stem[-2:], "conv1", "bn1")
    for stage, group in enumerate(encoder.block_groups, 1):
        for number, block in enumerate(group.layers):
            prefix = f"layer{stage}.{number}"
            if hasattr(block, "projection_layers"):
                shortcut, layers = block.projection_layers, block.conv_relu_dropblock_layers
            else:
                shortcut, layers = block.shortcut_layers, [*block.conv2d_bn_layers, block.se_layer]
            residual = []
            for layer in layers:
                if hasattr(layer, "conv2d_0"):  # SK_Conv2D
                    residual += [layer.conv2d_fixed_padding, layer.batch_norm_relu]
                    named[f"{prefix}.attention.reduce"] = layer.conv2d_0
                    named[f"{prefix}.attention.norm"] = layer.batch_norm_relu_1.bn
                    named[f"{prefix}.attention.expand"] = layer.conv2d_1
                elif hasattr(layer, "se_reduce"):  # SE_Layer
                    named[f"{prefix}.attention.reduce"] = layer.se_reduce
                    named[f"{prefix}.attention.expand"] = layer.se_expand
                else:
                    residual.append(layer)
            name_pairs(plain(residual), prefix + ".conv{}", prefix + ".bn{}")
            name_pairs(plain(shortcut), f"{prefix}.downsample.0", f"{prefix}.downsample.1")
    return named


def named_variables(encoder: Any) -> dict[str, Any]:
    """Every variable, likewise."""
    leaves = {"kernel": "weight", "gamma": "weight", "beta": "bias", "bias": "bias"}
    leaves |= {"moving_mean": "running_mean", "moving_variance": "running_var"}
    return {
        f"{name}.{leaf}": getattr(layer, attribute)
        for name, layer in named_layers(encoder).items()
        for attribute, leaf in leaves.items()
        if getattr(layer, attribute, None) is not None
    }


def encoder_reference(name: str, original: Any, flags: Any) -> dict[str, np.ndarray]:
    """h in evaluation and in training mode, and the statistics after that one training step."""
    import tensorflow as tf

    case = CASES[name]
    # In the original a ratio above 0 for SK also decides for ResNet-D.
    flags.sk_ratio = 1 / 16 if case.stem == "resnet-d" else 0.0
    flags.se_ratio = 1 / 16 if case.attention == "se" else 0.0
    kind = original.BottleneckBlock if case.bottleneck else original.ResidualBlock
    encoder = original.Resnet(kind, BLOCKS, case.width, cifar_stem=case.stem == "cifar")
    if not case.bottleneck:
        # It projects in the first block of every stage; torchvision and ours where the shape changes.
        encoder.block_groups[0].layers[0].shortcut_layers = []
    images = tf.constant(draw_images(name))
    encoder(images, training=False)  # makes the variables

    variables = named_variables(encoder)
    assert {id(v) for v in variables.values()} == {id(v) for v in encoder.variables}
    for key, variable in variables.items():
        shape = tuple(variable.shape)
        if len(shape) == 4:  # height, width, channels in, channels out
            weight = draw_weight(key, (shape[3], shape[2], *shape[:2]))
            variable.assign(weight.transpose(2, 3, 1, 0))
        else:
            variable.assign(draw_weight(key, shape))
    evaluated = encoder(images, training=False).numpy()
    trained = encoder(images, training=True).numpy()
    stats = {key: variable.numpy() for key, variable in variables.items() if "running" in key}
    return {"h_eval": evaluated, "h_train": trained, **stats}


def main(clone: Path) -> None:
    """Write every file, beside this one."""
    os.environ["TF_USE_LEGACY_KERAS"] = "1"
    sys.path.insert(0, str(clone / "tf2"))
    import resnet as original
    from absl import flags

    flags.DEFINE_float("sk_ratio", 0.0, "")
    flags.DEFINE_float("se_ratio", 0.0, "")
    flags.DEFINE_float("batch_norm_decay", 0.9, "")
    flags.DEFINE_bool("global_bn", False, "")
    flags.DEFINE_string("train_mode", "pretrain", "")
    flags.FLAGS(sys.argv[:1])
    for name in CASES:
        reference = encoder_reference(name, original, flags.FLAGS)
        np.savez_compressed(HERE / f"{name}.npz", allow_pickle=False, **reference)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
