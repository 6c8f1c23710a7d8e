"""The max pool of a ResNet's stem."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, same: bool) -> jax.Array:
    """The largest of 3x3 pixels, with stride 2. Of pixels that share it the first has the gradient.

    Args:
      x: float [N, H, W, C].
      same: pads an even side at its end only, as TensorFlow's "SAME" does, instead of both ends by 1.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C].
    """
    return _forward(x, same)[0]


def _forward(x: jax.Array, same: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    largest, tap = jax.lax.platform_dependent(
        x, tpu=functools.partial(_of_windows, same=same), default=functools.partial(_of_taps, same=same)
    )
    return largest, (x, tap)


def _backward(same: bool, kept: tuple[jax.Array, jax.Array], cotangent: jax.Array) -> tuple[jax.Array]:
    def of_windows(x: jax.Array, tap: jax.Array, cotangent: jax.Array) -> jax.Array:
        return jax.vjp(lambda x: _of_windows(x, same)[0], x)[1](cotangent)[0]

    def of_taps(x: jax.Array, tap: jax.Array, cotangent: jax.Array) -> jax.Array:
        return _to_taps(x.shape, tap, cotangent, same)

    return (jax.lax.platform_dependent(*kept, cotangent, tpu=of_windows, default=of_taps),)


max_pool.defvjp(_forward, _backward)


def _of_windows(x: jax.Array, same: bool) -> tuple[jax.Array, jax.Array]:
    """As XLA has it, for TPUs; and zeros for the taps, which its gradient does not ask for.

    On a GPU its gradient adds to memory pixel by pixel and keeps 20 bytes a window; on a CPU it takes 32 ms
    for 128 maps of 24x24x16, and that by taps 9 (docs/performance.md).
    """
    padding: Any = "SAME" if same else ((1, 1), (1, 1))
    largest = nnx.max_pool(x, (3, 3), (2, 2), padding)
    return largest, jnp.zeros(largest.shape, jnp.int8)


def _of_taps(x: jax.Array, same: bool) -> tuple[jax.Array, jax.Array]:
    """The largest, and which of the nine it is, int8 in 0 ... 8."""
    _, height, width, _ = x.shape
    padding = [(0, 0), _padding(height, same), _padding(width, same), (0, 0)]
    padded = jnp.pad(x, padding, constant_values=-jnp.inf)

    def pixels(number: int) -> jax.Array:
        row, column = divmod(number, 3)
        return padded[:, row : row + height : 2, column : column + width : 2]

    largest = pixels(0)
    tap = jnp.zeros(largest.shape, jnp.int8)
    for number in range(1, 9):
        other = pixels(number)
        larger = (other > largest) | jnp.isnan(other)
        largest, tap = jnp.where(larger, other, largest), jnp.where(larger, jnp.int8(number), tap)
    return largest, tap


def _to_taps(shape: tuple[int, ...], tap: jax.Array, cotangent: jax.Array, same: bool) -> jax.Array:
    """The gradient: to each pixel the cotangents of the windows that chose it, at most four."""
    zero = jnp.zeros((), cotangent.dtype)

    def spread(place: int, size: int, windows: int) -> tuple[int, int, int]:
        """Places the values of the windows one pixel apart, from the first window's pixel on."""
        first = place - _padding(size, same)[0]
        return first, size - 1 - (first + 2 * (windows - 1)), 1

    def at(number: int) -> jax.Array:
        chosen = jnp.where(tap == number, cotangent, zero)
        row, column = divmod(number, 3)
        rows, columns = spread(row, shape[1], tap.shape[1]), spread(column, shape[2], tap.shape[2])
        return jax.lax.pad(chosen, zero, [(0, 0, 0), rows, columns, (0, 0, 0)])

    return sum((at(number) for number in range(1, 9)), at(0))


def _padding(size: int, same: bool) -> tuple[int, int]:
    before = size % 2 if same else 1
    return before, 2 - before
