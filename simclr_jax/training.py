"""The training state and the pure step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from simclr_jax.data.batches import Batch

Metrics = dict[str, jax.Array]


class TrainState(struct.PyTreeNode):
    """All that changes from step to step, as plain arrays. Randomness is folded from `step` instead."""

    step: jax.Array  # int32 [], steps done
    params: Any
    batch_stats: Any
    opt_state: optax.OptState


def with_batch_statistics(model: nnx.Module, *, running: bool) -> nnx.Module:
    """`model`, sharing its arrays, with BatchNorm by running statistics (inference) or by the batch's."""
    # A model without BatchNorm has nothing to set, which nnx.view by default takes for a typing error.
    return nnx.view(model, use_running_average=running, raise_if_not_found=False)


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits `model` into its structure and the state before the first step.

    `nnx.as_pure` arrays under a plain `jax.jit` cost about 1 ms of host time a step, `nnx.jit` 25-32 ms
    (measured with the 267 leaves of a ResNet-50).
    """
    graphdef, params, batch_stats = nnx.split(
        with_batch_statistics(model, running=False), nnx.Param, nnx.BatchStat
    )
    params, batch_stats = nnx.as_pure(params), nnx.as_pure(batch_stats)
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    return graphdef, state


def project(
    graphdef: nnx.GraphDef, params: Any, batch_stats: Any, images: jax.Array, *, passes: str
) -> tuple[jax.Array, Any]:
    """Projections of a batch of views in training mode.

    Args:
      graphdef: structure of a `SimCLR` model in training mode.
      params: its parameters.
      batch_stats: its running statistics.
      images: float [2B, H, W, 3], first views of all images, then second views.
      passes: `"joint"`: one forward pass, BatchNorm normalises over all 2B views, as the paper's code
        does. `"separate"`: one pass a view, BatchNorm over B views each; the networks are the same, the
        gradients are not. Two of the published ResNet-18 recipes do it.

    Returns:
      z float32 [2B, D], and the running statistics after it.
    """
    if passes == "separate":
        first, second = jnp.split(images, 2)
        z_first, batch_stats = project(graphdef, params, batch_stats, first, passes="joint")
        z_second, batch_stats = project(graphdef, params, batch_stats, second, passes="joint")
        return jnp.concatenate([z_first, z_second]), batch_stats
    model = nnx.merge(graphdef, params, batch_stats)
    _, z = model(images)
    return z, nnx.as_pure(nnx.state(model, nnx.BatchStat))


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    make_views: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    project: Callable[[Any, Any, jax.Array], tuple[jax.Array, Any]],
    loss: Callable[[jax.Array], tuple[jax.Array, Metrics]],
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
) -> tuple[TrainState, Metrics]:
    """One step of SimCLR, pure: views, projections, loss, gradient, update.

    Args:
      state: state before the step.
      batch: B images.
      key: the run's key. The step's is folded from it with `state.step`, an image's from that with its
        index, so a resumed run sees the views that it would have seen.
      make_views: (keys [B], canvas, extent) to float [2B, H, W, 3].
      project: (params, batch_stats, views) to (z [2B, D], batch_stats).
      loss: z to (scalar, metrics).
      optimizer: Optax transformation.
      learning_rate: schedule, for the log only; `optimizer` has its own.

    Returns:
      State after the step, and scalar metrics of it.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, state.step), batch.ids)
    views = make_views(keys, batch.canvas, batch.extent)

    def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Any]]:
        z, batch_stats = project(params, state.batch_stats, views)
        value, metrics = loss(z)
        return value, (metrics, batch_stats)

    (value, (metrics, batch_stats)), gradient = jax.value_and_grad(objective, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
        "loss": value,
        **metrics,
        "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        "gradient_norm": optax.tree.norm(gradient),
        "parameter_norm": optax.tree.norm(params),
        "update_norm": optax.tree.norm(updates),
    }
    return TrainState(state.step + 1, params, batch_stats, opt_state), metrics


def make_run_steps(
    step: Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]],
    fetch: Callable[[Any, jax.Array], Batch],
    sharding: jax.sharding.Sharding,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled program of several steps in one dispatch.

    Args:
      step: one step, (state, batch, key) to (state, metrics).
      fetch: (arrays, indices [B]) to the batch.
      sharding: of state and metrics, going in and coming out. Left to the compiler it is another one
        coming out, and the second call compiles again.

    Returns:
      `run_steps(key, state, arrays, indices [K, B], count) -> (state, metrics [K])`: takes `count <= K`
      steps; `state` is donated, and the metrics beyond `count` are zero. `count` is a traced number, so
      that every length runs the same compiled body: where the calls of a run begin and end, and so an
      interruption, cannot change its bits. `lax.scan` would compile the body again for each length.
    """

    def run_steps(
        key: jax.Array, state: TrainState, arrays: Any, indices: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        if len(indices) == 1:
            # No loop around a single step: XLA's CPU backend runs convolutions in a loop body on one
            # thread and without its fast kernels.
            state, metrics = step(state, fetch(arrays, indices[0]), key)
            return state, jax.tree.map(lambda value: value[None], metrics)

        def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            state, metrics = step(state, fetch(arrays, indices[i]), key)
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), history, metrics)

        _, shapes = jax.eval_shape(lambda: step(state, fetch(arrays, indices[0]), key))
        history = jax.tree.map(lambda one: jnp.zeros((len(indices),), one.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, history))

    return jax.jit(run_steps, donate_argnames="state", out_shardings=sharding)
