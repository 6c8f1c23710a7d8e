"""What the functions of this package say about arguments they cannot take.

Shapes, types and Python numbers are known while JAX traces, and are always looked at. Values of arrays
are looked at where there are any, outside `jax.jit` and `jax.vmap`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

Range = tuple[float, float]

# A view may be this many times as large as the image's canvas: 28 pixels may become 224.
MAX_ENLARGEMENT = 8

_ROUNDING = 1e-3  # how far a value may leave [0, 1]: what bfloat16 or a matrix product may do to it


def image(name: str, value: Any) -> Array:
    """`value` as an array [H, W, 3] of floats in [0, 1]; raises ValueError unless it is one."""
    value = _colours(name, value, rank=3)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must be float in [0, 1], got {value.dtype}; divide uint8 by 255")
    return value


def canvas(name: str, value: Any, *, rank: int = 3) -> Array:
    """`value` as an array [..., H, W, 3] of uint8 or of floats in [0, 1]; else ValueError."""
    value = _colours(name, value, rank)
    if value.dtype != jnp.uint8 and not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{name} must be uint8, or float in [0, 1], got {value.dtype}")
    return value


def _colours(name: str, value: Any, rank: int) -> Array:
    value = jnp.asarray(value)
    if value.ndim != rank or value.shape[-1] != 3 or 0 in value.shape:
        shape = "[H, W, 3]" if rank == 3 else "[B, H, W, 3]"
        raise ValueError(f"{name} must have shape {shape}, got {list(value.shape)}")
    if jnp.issubdtype(value.dtype, jnp.floating) and not isinstance(value, Tracer):
        with jax.ensure_compile_time_eval():
            low, high = float(jnp.min(value)), float(jnp.max(value))
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(f"{name} must lie in [0, 1], got values from {low:g} to {high:g}")
    return value


def extent(
    name: str, value: Any, shape: tuple[int, ...] | None = None, *, batch: tuple[int, ...] = ()
) -> Array:
    """`value` as int32 [*batch, 2], each at least 1 and at most the canvas's [H, W]; else ValueError."""
    value = jnp.asarray(value)
    expected = [*batch, 2]
    if list(value.shape) != expected or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers of shape {expected}, got {value.dtype} {list(value.shape)}"
        )
    if not isinstance(value, Tracer):
        pairs = np.asarray(value).reshape(-1, 2)
        limit = pairs if shape is None else np.asarray(shape)
        bad = pairs[((pairs < 1) | (pairs > limit)).any(axis=1)]
        if len(bad):
            fit = "of at least 1" if shape is None else f"between 1 and the canvas's {tuple(shape)}"
            raise ValueError(f"{name} must be (height, width) {fit}, got {tuple(bad[0].tolist())}")
    return value.astype(jnp.int32)


def box(name: str, value: Any, shape: tuple[int, ...]) -> Array:
    """`value` as float32 [4], a box of whole pixels inside a canvas of `shape` [H, W]; else ValueError."""
    value = jnp.asarray(value, jnp.float32)
    if value.shape != (4,):
        raise ValueError(f"{name} must be (top, left, height, width), got shape {list(value.shape)}")
    if not isinstance(value, Tracer):
        numbers = np.asarray(value)
        top, left, height, width = numbers
        inside = top >= 0 and left >= 0 and top + height <= shape[0] and left + width <= shape[1]
        if not (inside and height >= 1 and width >= 1 and (numbers == np.round(numbers)).all()):
            raise ValueError(
                f"{name} must be (top, left, height, width) in whole pixels inside the canvas of "
                f"{tuple(shape)}, got {tuple(numbers.tolist())}"
            )
    return value


def size(name: str, value: int, shape: tuple[int, ...]) -> None:
    """Raises ValueError unless a view of `value` pixels can be had from a canvas of `shape` [H, W]."""
    largest = MAX_ENLARGEMENT * max(shape)
    if not 1 <= value <= largest:
        raise ValueError(
            f"{name} must be between 1 and {largest}, {MAX_ENLARGEMENT} times the canvas's {tuple(shape)}, "
            f"got {value}"
        )


def number_range(name: str, value: Any, *, high: float = float("inf")) -> None:
    """Raises ValueError unless `value` is (low, high) with 0 < low <= high <= `high`."""
    if len(value) != 2 or (_known(value) and not 0 < value[0] <= value[1] <= high):
        limit = f" <= {high}" if high < float("inf") else ""
        raise ValueError(f"{name} must be (low, high) with 0 < low <= high{limit}, got {value}")


def probability(name: str, value: ArrayLike) -> None:
    """Raises ValueError for a number outside [0, 1]."""
    if isinstance(value, int | float) and not 0 <= value <= 1:
        raise ValueError(f"{name} must be a probability in [0, 1], got {value}")


def at_least_zero(name: str, what: str, value: ArrayLike, *, high: float = float("inf")) -> None:
    """Raises ValueError for a number below 0 or above `high`."""
    if isinstance(value, int | float) and not 0 <= value <= high:
        limit = "of at least 0" if high == float("inf") else f"between 0 and {high}"
        raise ValueError(f"{name} must be a {what} {limit}, got {value}")


def kernel_size(name: str, value: int, side: int) -> None:
    """Raises ValueError unless `value` is odd and can be reflected at the borders of `side` pixels."""
    if value < 1 or value % 2 == 0 or value > 2 * side - 1:
        raise ValueError(
            f"{name} must be odd and between 1 and {2 * side - 1} for an image of shorter side "
            f"{side}, got {value}"
        )


def is_zero(value: ArrayLike) -> bool:
    """Whether a probability or strength is the number 0, and so its operation not part of the program."""
    return isinstance(value, int | float) and value == 0


def _known(values: Any) -> bool:
    return not any(isinstance(value, Tracer) for value in values)
