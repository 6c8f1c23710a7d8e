"""Learning rates: scaled with the batch, warmed up, decayed along a cosine."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

SCALINGS = ("linear", "sqrt", "none")


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
    """Return the peak learning rate for a batch of `batch_size` images (before they become views).

    `scaling` is "linear", base · B / 256; "sqrt", base · √B (both: Chen et al. 2020, appendix B.1;
    0.3 linear and 0.075 sqrt agree at B = 4096); or "none", base.

    Raises:
      ValueError: for an unknown scaling or a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    match scaling:
        case "linear":
            return base * batch_size / 256
        case "sqrt":
            return base * math.sqrt(batch_size)
        case "none":
            return base
    raise ValueError(f"scaling is {scaling!r}; expected one of {', '.join(SCALINGS)}")


def warmup_cosine(
    peak: float, *, total_steps: int, warmup_steps: int, final_fraction: float = 0.0
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Return a schedule, step (int, from 0) -> learning rate (float32), for optax and for jit.

    Linear over the steps before `warmup_steps`, `peak` at `warmup_steps`, then a cosine that reaches
    `final_fraction * peak` at `total_steps`, one past the last step taken, and stays there.

    google-research/simclr (tf2/model.py) warms up as step / warmup_steps, so that its first step has
    learning rate 0 and trains nothing. Here it is (step + 1) / (warmup_steps + 1).

    Raises:
      ValueError: unless 0 <= warmup_steps < total_steps.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warmup_steps is {warmup_steps}; expected 0 <= warmup_steps < total_steps={total_steps}"
        )

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warmup = (step + 1) / (warmup_steps + 1)
        progress = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        decay = final_fraction + (1 - final_fraction) * cosine
        return peak * jnp.where(step < warmup_steps, warmup, decay)

    return schedule
