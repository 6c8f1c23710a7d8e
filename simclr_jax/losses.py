"""NT-Xent, the contrastive loss of SimCLR, and how well each view finds its partner.

To train with another loss, write a function here from projections to a scalar and metrics, as `nt_xent`
is, and name it in `recipe.build_step`; nothing else knows the loss.
"""

import jax
import jax.numpy as jnp
from jax.core import Tracer

# Of the squared norm, as tf.math.l2_normalize has it: shorter vectors shrink instead of dividing by
# zero, and the gradient at the zero vector is finite.
_MIN_SQUARED_NORM = 1e-12


def nt_xent(z: jax.Array, *, temperature: float | jax.Array) -> tuple[jax.Array, dict]:
    """Normalised-temperature cross-entropy (Chen et al. 2020, arXiv:2002.05709, equation 1).

    Computed in float32 whatever the dtype of `z`. A loss of log(2B - 1) is what a collapsed encoder,
    all of whose projections are equal, gets.

    Args:
      z: projections [2B, D], the first views of all images and then the second views, so that the
        positive of row i is row (i + B) mod 2B. Any length: rows are normalised here.
      temperature: divides the cosine similarities; positive.

    Returns:
      The loss, averaged over both directions, and metrics without gradient, each a scalar:
      `contrast_top1` and `contrast_top5`, the share of rows in [0, 1] whose positive is the most
      similar, or among the five most similar, of the 2B - 1 other rows, and `positive_rank`, the
      mean place of the positive (1 is best). A tie, or a NaN, counts against the positive: a
      collapsed encoder must not look perfect.

    Raises:
      ValueError: for a shape that is not [2B, D] with B >= 2, or a temperature known not to be > 0.
    """
    if z.ndim != 2 or z.shape[0] % 2 or z.shape[0] < 4:
        raise ValueError(f"z has shape {z.shape}; expected [2B, D] with B >= 2")
    if not isinstance(temperature, Tracer) and not temperature > 0:
        raise ValueError(f"temperature is {temperature}; expected a number > 0")

    z = z.astype(jnp.float32)
    squared_norm = jnp.sum(z * z, axis=1, keepdims=True)
    z = z * jax.lax.rsqrt(jnp.maximum(squared_norm, _MIN_SQUARED_NORM))
    # By default a TPU, and a GPU with TF32, multiply in about bfloat16; 1 / temperature would then
    # multiply that error.
    logits = jnp.matmul(z, z.T, precision=jax.lax.Precision.HIGHEST) / temperature

    # Masks instead of gathers: under a sharded batch they stay where the rows are.
    row = jnp.arange(z.shape[0])
    partner = jnp.roll(row, z.shape[0] // 2)
    logits = jnp.where(row[:, None] == row[None, :], -jnp.inf, logits)
    positive = jnp.sum(jnp.where(partner[:, None] == row[None, :], logits, 0.0), axis=1)
    loss = jnp.mean(jax.nn.logsumexp(logits, axis=1) - positive)
    return loss, _retrieval(*jax.lax.stop_gradient((logits, positive)))


def _retrieval(logits: jax.Array, positive: jax.Array) -> dict:
    # "Not smaller" holds for the positive itself, so the count is already the rank; for ties and
    # NaN, which so rank last; and not for the masked diagonal.
    rank = jnp.sum(~(logits < positive[:, None]), axis=1)
    return {
        "contrast_top1": jnp.mean(rank <= 1, dtype=jnp.float32),
        "contrast_top5": jnp.mean(rank <= 5, dtype=jnp.float32),
        "positive_rank": jnp.mean(rank, dtype=jnp.float32),
    }
