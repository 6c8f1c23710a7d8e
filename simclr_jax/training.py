"""The training state and the pure step."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from simclr_jax import gradients
from simclr_jax.data.batches import Batch
from simclr_jax.gradients import Forward, Loss, MakeTargets, Metrics


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


def weights(model: nnx.Module) -> tuple[Any, Any]:
    """Parameters and running statistics of `model`, as plain arrays."""
    _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    return nnx.as_pure(params), nnx.as_pure(batch_stats)


def create_state(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, running: bool = False
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits `model` into its structure and the state before the first step.

    BatchNorm uses the batch's statistics, or with `running` those that it has, which then stay.

    `nnx.as_pure` arrays under a plain `jax.jit` cost about 1 ms of host time a step, `nnx.jit` 25-32 ms
    (measured with the 267 leaves of a ResNet-50).
    """
    graphdef, params, batch_stats = nnx.split(
        with_batch_statistics(model, running=running), nnx.Param, nnx.BatchStat
    )
    params, batch_stats = nnx.as_pure(params), nnx.as_pure(batch_stats)
    state = TrainState(jnp.zeros((), jnp.int32), params, batch_stats, optimizer.init(params))
    return graphdef, state


def forward(
    graphdef: nnx.GraphDef, params: Any, batch_stats: Any, views: Sequence[jax.Array]
) -> tuple[jax.Array, Any]:
    """Outputs of a model for views: projections of a `SimCLR`, logits of a `Classifier`.

    Args:
      graphdef: structure of the model, which says whether BatchNorm is in training mode.
      params: its parameters.
      batch_stats: its running statistics.
      views: float [n, H, W, 3] each. Every array is a forward pass of its own, over which BatchNorm
        takes its statistics.

    Returns:
      float32 [sum of n, D], and the running statistics after all passes.
    """
    outputs = []
    for images in views:
        model = nnx.merge(graphdef, params, batch_stats)
        outputs.append(model(images))
        batch_stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    return jnp.concatenate(outputs), batch_stats


def image_keys(key: jax.Array, step: jax.Array | int, ids: jax.Array) -> jax.Array:
    """The keys [B] of the images `ids` int32 [B] at a step of a run with `key`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), ids)


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    make_views: Callable[[jax.Array, jax.Array, jax.Array], Sequence[jax.Array]],
    forward: Forward,
    loss: Loss,
    make_targets: MakeTargets = lambda batch, views: (),
    optimizer: optax.GradientTransformation,
    learning_rate: optax.Schedule,
    microbatches: int = 1,
    unroll: bool = False,
) -> tuple[TrainState, Metrics]:
    """One step of any stage, pure: views, outputs, loss, gradient, update.

    Args:
      state: state before the step.
      batch: B images.
      key: the run's key, from which `image_keys` folds those of the images, so that a resumed run sees
        the views that it would have seen.
      make_views: (keys [B], canvas, extent) to arrays of views, one a forward pass.
      forward: (params, batch_stats, views) to (outputs [views * B, D], batch_stats).
      loss: (outputs, *targets) to (scalar, metrics).
      make_targets: what the loss compares the outputs with beside themselves, such as labels; computed
        outside of the gradient.
      optimizer: Optax transformation.
      learning_rate: schedule, for the log only; `optimizer` has its own.
      microbatches: number of parts that the batch is computed in; see `gradients.of_microbatches`.
      unroll: as there.

    Returns:
      State after the step, and scalar metrics of it.
    """

    def views_of(batch: Batch) -> Sequence[jax.Array]:
        return make_views(image_keys(key, state.step, batch.ids), batch.canvas, batch.extent)

    compute = gradients.of_batch
    if microbatches > 1:
        compute = partial(gradients.of_microbatches, count=microbatches, unroll=unroll)
    found = compute(
        state.params,
        state.batch_stats,
        batch,
        make_views=views_of,
        forward=forward,
        loss=loss,
        make_targets=make_targets,
    )
    params, opt_state, norms = update(state.params, state.opt_state, found.gradient, optimizer)
    metrics = {
        "loss": found.value,
        **found.metrics,
        "learning_rate": jnp.asarray(learning_rate(state.step), jnp.float32),
        **norms,
    }
    return TrainState(state.step + 1, params, found.batch_stats, opt_state), metrics


def update(
    params: Any, opt_state: optax.OptState, gradient: Any, optimizer: optax.GradientTransformation
) -> tuple[Any, optax.OptState, Metrics]:
    """One update, and its norms for the log.

    Returns:
      The parameters and the optimizer's state after it, and Euclidean norms, each over all arrays: of the
      gradient, of the new parameters, and of how far they moved, with what float32 rounds.
    """
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    updated = optax.apply_updates(params, updates)
    norms = {
        "gradient_norm": optax.tree.norm(gradient),
        "parameter_norm": optax.tree.norm(updated),
        # Not of `updates`, otherwise never stored: AdamW's of a ResNet-18 took 65 ms instead of 43 on a CPU.
        "update_norm": optax.tree.norm(jax.tree.map(jnp.subtract, updated, params)),
    }
    return updated, opt_state, norms


def compiler_options(device: Any) -> dict[str, str] | None:
    """For programs with a gradient on `device`.

    By default XLA's CPU backend puts the gradients of all kernels last and keeps every map for them. In the
    other order a ResNet-18 step of 64 CIFAR-10 images takes 2.37 s instead of 2.53, and remat has an effect.
    """
    if device.platform == "cpu":
        return {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}
    return None


def make_run_steps(
    step: Callable[[TrainState, Batch, Any], tuple[TrainState, Metrics]],
    fetch: Callable[[Any, jax.Array], Batch],
    sharding: jax.sharding.Sharding,
) -> jax.stages.Wrapped:
    """The compiled program of several steps in one dispatch.

    Args:
      step: one step, (state, batch, key) to (state, metrics). The key comes from the caller as it is, so
        that it may be a tuple of a key and what else is the same for all steps of a call.
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
        key: Any, state: TrainState, arrays: Any, indices: jax.Array, count: jax.Array
    ) -> tuple[TrainState, Metrics]:
        if len(indices) == 1:
            # No loop around a single step: XLA's CPU backend runs convolutions in a loop body on one
            # thread and without its fast kernels.
            state, metrics = step(state, fetch(arrays, indices[0]), key)
            return state, jax.tree.map(lambda value: value[None], metrics)

        # Traced once, for the shapes of the metrics and for the loop.
        traced = jax.jit(step)

        def body(i: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, history = carry
            state, metrics = traced(state, fetch(arrays, indices[i]), key)
            return state, jax.tree.map(lambda all, one: all.at[i].set(one), history, metrics)

        _, shapes = jax.eval_shape(lambda: traced(state, fetch(arrays, indices[0]), key))
        history = jax.tree.map(lambda one: jnp.zeros((len(indices),), one.dtype), shapes)
        return jax.lax.fori_loop(0, count, body, (state, history))

    options = compiler_options(next(iter(sharding.device_set)))
    return jax.jit(run_steps, donate_argnames="state", out_shardings=sharding, compiler_options=options)
