"""Weights of a ResNet encoder under torchvision's names and in its layout, and the files that hold them.

PyTorch reads such a file with `safetensors.torch.load_file`, for `torchvision.models.resnet18` and its like,
and writes one with `safetensors.torch.save_file(model.state_dict(), path)`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp  # with its ml_dtypes, NumPy and so safetensors know bfloat16
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from simclr_jax import paths
from simclr_jax.errors import UserError

_LEAVES = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_CLASSIFIERS = ("fc", "head", "classifier")
_COUNTER = "num_batches_tracked"  # of training steps, beside each running mean; nothing here reads it


def torchvision_name(path: Sequence[Any]) -> str:
    """The name in torchvision of the parameter or statistic of a `resnet.ResNet` at `path`.

    Args:
      path: keys from the root of the tree, such as ("stages", 0, 1, "norms", 0, "scale").

    Returns:
      A name such as "layer1.1.bn1.weight".

    Raises:
      ValueError: for a path that torchvision's ResNets do not have.
    """
    match tuple(path):
        case ("conv", "kernel"):
            return "conv1.weight"
        case ("norm", leaf) if leaf in _LEAVES:
            return f"bn1.{_LEAVES[leaf]}"
        case ("stages", stage, block, "convs", i, "kernel"):
            return f"layer{stage + 1}.{block}.conv{i + 1}.weight"
        case ("stages", stage, block, "norms", i, leaf) if leaf in _LEAVES:
            return f"layer{stage + 1}.{block}.bn{i + 1}.{_LEAVES[leaf]}"
        case ("stages", stage, block, "shortcut_conv", "kernel"):
            return f"layer{stage + 1}.{block}.downsample.0.weight"
        case ("stages", stage, block, "shortcut_norm", leaf) if leaf in _LEAVES:
            return f"layer{stage + 1}.{block}.downsample.1.{_LEAVES[leaf]}"
    raise ValueError(f"torchvision's ResNets have no parameter like {'.'.join(map(str, path))}")


def to_torchvision(params: Any, batch_stats: Any) -> dict[str, np.ndarray]:
    """An encoder's weights as torchvision's `state_dict` has them, without `fc`.

    Args:
      params: parameters of a `resnet.ResNet`, nested dicts of arrays (`nnx.as_pure` of its state).
      batch_stats: its running statistics, likewise; empty under GroupNorm.

    Returns:
      float32 arrays by name, convolutions as [channels out, channels in, H, W]; and beside each running mean
      an int64 `num_batches_tracked` of 0.

    Raises:
      ValueError: for an encoder that is no ResNet of torchvision's; names the first parameter that is not.
    """
    tensors = {}
    for name, value in [*_named_leaves(params), *_named_leaves(batch_stats)]:
        array = np.asarray(value, np.float32)
        tensors[name] = np.ascontiguousarray(array.transpose(3, 2, 0, 1)) if array.ndim == 4 else array
        module, _, kind = name.rpartition(".")
        if kind == "running_mean":
            tensors[f"{module}.{_COUNTER}"] = np.zeros((), np.int64)
    return tensors


def from_torchvision(tensors: Mapping[str, np.ndarray], params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """An encoder's weights from those of torchvision's model of the same shape.

    Classifiers (`fc`, `head`, `classifier`) and `num_batches_tracked` are left out. Where all other names
    begin with the same prefix, such as `module.` or `backbone.`, they are read without it.

    Args:
      tensors: floating-point arrays by name, as `state_dict` has them.
      params: of the encoder; nested dicts whose leaves have the shapes, arrays or `jax.ShapeDtypeStruct`.
      batch_stats: likewise.

    Returns:
      `params` and `batch_stats` with float32 NumPy arrays for leaves.

    Raises:
      ValueError: for the first parameter of the encoder that is missing, has another shape or whole numbers;
        a tensor that the encoder has no place for; or an encoder that is no ResNet of torchvision's.
    """
    wanted = [*_named_leaves(params), *_named_leaves(batch_stats)]
    left = _of_the_encoder(tensors)

    def take(name: str, like: Any) -> np.ndarray:
        kernel, channels = like.shape[:-2], like.shape[-2:]
        shape = (*reversed(channels), *kernel)
        if name not in left:
            raise ValueError(f"{name} of shape {shape} is missing; unused so far: {_summary(left)}")
        tensor = left.pop(name)
        if tensor.shape != shape:
            raise ValueError(f"{name} has shape {tensor.shape}; the encoder's has {shape}")
        if not jnp.issubdtype(tensor.dtype, jnp.floating):  # NumPy's does not know bfloat16
            raise ValueError(f"{name} is of {tensor.dtype}; expected floating-point numbers")
        tensor = tensor.astype(np.float32)
        return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor

    filled = [take(name, like) for name, like in wanted]
    if left:
        raise ValueError(f"the encoder has no place for {_summary(left)}")
    return jax.tree.unflatten(jax.tree.structure((params, batch_stats)), filled)


def read(path: paths.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file by name, each of the type it is stored in.

    Raises:
      UserError: if there is no such file, or it is damaged or not a safetensors file.
    """
    try:
        with paths.local_copy(path) as local:
            with open(local, "rb") as file:
                start = file.read(9)
            if start[8:] != b"{":  # after the length of the header, which is JSON
                raise UserError(
                    f"{path} is not a safetensors file; where PyTorch has the weights loaded, it writes one "
                    'with `safetensors.torch.save_file(model.state_dict(), "x.safetensors")`'
                )
            return safetensors.numpy.load_file(local)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); name a safetensors file") from error
    except (SafetensorError, AttributeError, TypeError) as error:  # the last two from NumPy
        raise UserError(
            f"{path} is damaged, or of numbers that NumPy lacks ({error}); get it again"
        ) from error


def write(path: paths.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file so that no reader meets half of it. Errors are those of `paths.write`.

    Args:
      path: of the file, in a folder that exists.
      tensors: arrays by name.
      metadata: text by name, which goes into the file's header.
    """
    # safetensors 0.8.0 writes the memory of an array in the order it lies, be it transposed or not.
    arranged = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    # In memory first: `save_file` reports a full disk by an exception of its own.
    paths.write(path, safetensors.numpy.save(arranged, dict(metadata)))


def _named_leaves(tree: Any) -> list[tuple[str, Any]]:
    return [
        (torchvision_name([key.key for key in path]), leaf) for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def _summary(tensors: Mapping[str, np.ndarray]) -> str:
    first = next(iter(tensors), "nothing")
    return f"{first} and {len(tensors) - 1} more" if len(tensors) > 1 else first


def _of_the_encoder(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Those of `tensors` that are of an encoder, by their names without a common prefix."""
    left = dict(tensors)
    while True:
        left = {
            name: tensor
            for name, tensor in left.items()
            if name.partition(".")[0] not in _CLASSIFIERS and name.rpartition(".")[2] != _COUNTER
        }
        # Only a prefix that all share: a file with two networks, such as a student and its teacher, has
        # the names of an encoder under either, and to choose one would be a guess.
        prefixes = {"".join(name.partition(".")[:2]) for name in left}
        if len(prefixes) != 1 or not (prefix := prefixes.pop()).endswith("."):
            return left
        left = {name.removeprefix(prefix): tensor for name, tensor in left.items()}
