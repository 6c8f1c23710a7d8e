"""The max pool of a ResNet's stem, with a form of its own for CPUs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, same: bool) -> jax.Array:
    """The largest of 3x3 pixels, with stride 2.

    Where several pixels share the maximum, one has the gradient, and on a CPU they share it.

    Args:
      x: float [N, H, W, C].
      same: pads an even side at its end only, as TensorFlow's "SAME" does, instead of both ends by 1.

    Returns:
      [N, ceil(H / 2), ceil(W / 2), C].
    """
    return jax.lax.platform_dependent(
        x, cpu=functools.partial(_of_shifted, same=same), default=functools.partial(_of_windows, same=same)
    )


def _forward(x: jax.Array, same: bool) -> tuple[jax.Array, jax.Array]:
    return max_pool(x, same), x


def _backward(same: bool, x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    def gradient(form):
        return lambda x, cotangent: jax.vjp(functools.partial(form, same=same), x)[1](cotangent)

    return jax.lax.platform_dependent(x, cotangent, cpu=gradient(_of_shifted), default=gradient(_of_windows))


max_pool.defvjp(_forward, _backward)


def _of_windows(x: jax.Array, same: bool) -> jax.Array:
    """As an accelerator has it.

    By the compiler of a TPU v5e a ResNet-18's gradient has 8.3 GB to move with it, and with the other form
    12.1 (128 views of 128 pixels; docs/performance.md).
    """
    padding: Any = "SAME" if same else ((1, 1), (1, 1))
    return nnx.max_pool(x, (3, 3), (2, 2), padding)


def _of_shifted(x: jax.Array, same: bool) -> jax.Array:
    """As maxima of shifted maps.

    On a CPU the gradient of 128 maps of 24x24x16 takes 1.5 ms, that of the other form 25.
    """
    for axis in (1, 2):
        size = x.shape[axis]
        before = size % 2 if same else 1
        padding = [(before, 2 - before) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(x, padding, constant_values=-jnp.inf)
        shifted = [jax.lax.slice_in_dim(padded, i, i + size, stride=2, axis=axis) for i in range(3)]
        x = jnp.maximum(jnp.maximum(shifted[0], shifted[1]), shifted[2])
    return x
