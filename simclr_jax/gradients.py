"""A loss and its gradient: of the whole batch at once, or exactly the same from microbatches.

A contrastive loss compares every image of a batch with every other, so adding up the gradients of small
batches is not the gradient of a large one. But images meet in the outputs alone, which are small. Gradient
caching (Gao et al. 2021, arXiv:2101.06983) computes the outputs of all microbatches first, and keeps nothing
else; then the loss and its gradient at the outputs; then each microbatch again, with its part of that.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from simclr_jax.data.batches import Batch

Metrics = dict[str, jax.Array]
MakeViews = Callable[[Batch], Sequence[jax.Array]]
Forward = Callable[[Any, Any, Sequence[jax.Array]], tuple[jax.Array, Any]]
Loss = Callable[..., tuple[jax.Array, Metrics]]
MakeTargets = Callable[[Batch, Sequence[jax.Array]], tuple[jax.Array, ...]]


class LossGradient(NamedTuple):
    """What a step needs of its batch."""

    value: jax.Array  # float [], the loss
    metrics: Metrics
    batch_stats: Any  # running statistics after the batch
    gradient: Any  # of the parameters


def of_batch(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    make_views: MakeViews,
    forward: Forward,
    loss: Loss,
    make_targets: MakeTargets,
) -> LossGradient:
    """The gradient of the batch at once.

    Args:
      params: parameters.
      batch_stats: running statistics of BatchNorm.
      batch: B images.
      make_views: batch to arrays of views, one a forward pass.
      forward: (params, batch_stats, views) to (outputs [views * B, D], batch_stats).
      loss: (outputs, *targets) to (scalar, metrics).
      make_targets: what the loss compares the outputs with beside themselves; no gradient goes through it.
    """
    views = make_views(batch)
    targets = make_targets(batch, views)

    def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        outputs, new_stats = forward(params, batch_stats, views)
        value, metrics = loss(outputs, *targets)
        return value, (metrics, new_stats)

    (value, (metrics, new_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(params)
    return LossGradient(value, metrics, new_stats, gradient)


def of_microbatches(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    count: int,
    unroll: bool,
    make_views: MakeViews,
    forward: Forward,
    loss: Loss,
    make_targets: MakeTargets,
) -> LossGradient:
    """The gradient of the batch, with what one microbatch needs of memory.

    Microbatch k is every `count`-th image from the k-th on: so each device has the same share of each, and
    the number of devices changes nothing. Each is forwarded from the same running statistics, and the new
    ones are the mean of theirs. A BatchNorm that does not use running statistics takes those of a microbatch:
    this is then the gradient of a model that normalises each microbatch by itself. Views are made twice, from
    the same keys, rather than kept: of 4,096 images of 224 pixels they are 4.9 GB.

    Args:
      params: parameters.
      batch_stats: running statistics of BatchNorm.
      batch: B images; B is a multiple of `count`.
      count: number of microbatches.
      unroll: write them out one after the other instead of as a loop, in whose body XLA's CPU backend runs
        convolutions on one thread and without its fast kernels.
      make_views: as of `of_batch`.
      forward: as of `of_batch`.
      loss: as of `of_batch`.
      make_targets: as of `of_batch`.
    """

    def part(k: jax.Array) -> Batch:
        return jax.tree.map(
            lambda rows: jax.lax.dynamic_index_in_dim(_in_parts(rows, count), k, 1, False), batch
        )

    def embed(_: None, k: jax.Array) -> tuple[None, tuple[jax.Array, tuple[jax.Array, ...], Any]]:
        images = part(k)
        views = make_views(images)
        outputs, new_stats = forward(params, batch_stats, views)
        return None, (outputs, make_targets(images, views), new_stats)

    def join(parts: jax.Array) -> jax.Array:
        """Of the microbatches [count, views * B / count, ...] to the batch's [views * B, ...]."""
        by_view = parts.reshape(count, -1, len(batch.ids) // count, *parts.shape[2:])
        return jnp.moveaxis(by_view, 0, 2).reshape(-1, *parts.shape[2:])

    def cut(rows: jax.Array) -> jax.Array:
        """The inverse of `join`."""
        by_part = jnp.moveaxis(_in_parts(rows, count), 1, 0)
        return by_part.reshape(count, -1, *rows.shape[1:])

    numbers = jnp.arange(count)
    _, (outputs, targets, new_stats) = jax.lax.scan(embed, None, numbers, unroll=unroll)
    targets = jax.tree.map(join, targets)
    value, pull_back, metrics = jax.vjp(lambda rows: loss(rows, *targets), join(outputs), has_aux=True)
    (cotangents,) = pull_back(jnp.ones_like(value))

    def add(total: Any, given: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        k, cotangent = given
        if unroll:
            # XLA's CPU backend would begin all microbatches at once, and drops optimization barriers: so an
            # index that waits for the microbatch before, and never is another one while no gradient is NaN.
            # Four microbatches of 16 images, ResNet-18 of half width: 78 MB instead of the batch's 210.
            k += jnp.isnan(sum(leaf.ravel()[0] for leaf in jax.tree.leaves((total, cotangent))))
        views = make_views(part(k))
        _, pull_back = jax.vjp(lambda params: forward(params, batch_stats, views)[0], params)
        return jax.tree.map(jnp.add, total, pull_back(cotangent)[0]), None

    zero = jax.tree.map(jnp.zeros_like, params)
    gradient, _ = jax.lax.scan(add, zero, (numbers, cut(cotangents)), unroll=unroll)
    mean_stats = jax.tree.map(lambda parts: jnp.mean(parts, axis=0), new_stats)
    return LossGradient(value, metrics, mean_stats, gradient)


def _in_parts(rows: jax.Array, count: int) -> jax.Array:
    """[N, ...] to [N / count, count, ...]: the microbatches of the rows along axis 1."""
    return rows.reshape(-1, count, *rows.shape[1:])
