"""Attention over channels: the mean of a map decides, image by image, how much each channel counts.

Both as SimCLRv2 has them (Chen et al. 2020, arXiv:2006.10029; google-research/simclr, tf2/resnet.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

_RATIO = 16  # width of a block's 3x3 convolution to that between the two layers
_MIN_SELECTING_WIDTH = 32


class SqueezeExcitation(nnx.Module):
    """Multiplies each channel by a weight in (0, 1) (Hu et al. 2018, arXiv:1709.01507, section 3)."""

    def __init__(self, channels: int, width: int, *, dtype: jnp.dtype | type, rngs: nnx.Rngs):
        """Build the two layers between means and weights, `width` / 16 wide and at least 1.

        Args:
          channels: of the map.
          width: of the block's 3x3 convolution, a quarter of `channels` in a bottleneck.
          dtype: of the computation; parameters are float32.
          rngs: gives the keys for the initial weights.
        """
        reduced = max(1, width // _RATIO)
        self.reduce = nnx.Linear(channels, reduced, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(reduced, channels, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, channels] to the same shape."""
        means = jnp.mean(x, axis=(1, 2), dtype=jnp.float32)
        weights = nnx.sigmoid(self.expand(nnx.relu(self.reduce(means))))
        return x * weights[:, None, None, :]


class SelectiveKernels(nnx.Module):
    """Mixes two branches of a convolution, channel by channel, by weights that add up to 1.

    After Li et al. 2019, arXiv:1903.06586, section 3.1, whose branches have kernels of two sizes. Those of
    SimCLRv2 are both 3x3, so that one convolution of twice the channels computes them.
    """

    def __init__(
        self,
        channels: int,
        make_norm: Callable[[int], nnx.Module],
        *,
        dtype: jnp.dtype | type,
        rngs: nnx.Rngs,
    ):
        """Build the two layers between means and weights, `channels` / 16 wide and at least 32.

        Args:
          channels: of each branch.
          make_norm: gives the normalisation between the layers, of rows [N, width], for a width.
          dtype: of the computation; parameters are float32.
          rngs: gives the keys for the initial weights.
        """
        reduced = max(_MIN_SELECTING_WIDTH, channels // _RATIO)
        self.reduce = nnx.Linear(channels, reduced, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = make_norm(reduced)
        self.expand = nnx.Linear(reduced, 2 * channels, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map [N, H, W, 2 * channels], the branches side by side, to [N, H, W, channels]."""
        first, second = jnp.split(jnp.mean(x, axis=(1, 2), dtype=jnp.float32), 2, axis=-1)
        scores = self.expand(nnx.relu(self.norm(self.reduce(first + second))))
        # The softmax over two scores is the sigmoid of their difference.
        first, second = jnp.split(scores, 2, axis=-1)
        weight = nnx.sigmoid(first - second)[:, None, None, :]
        first, second = jnp.split(x, 2, axis=-1)
        return weight * first + (1 - weight) * second
