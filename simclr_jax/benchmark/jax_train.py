"""This package's training step, as a run takes it, and its parts by themselves."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from simclr_jax import config as configs
from simclr_jax import footprint, gradients, kept_memory, recipe, rehearsal, training
from simclr_jax import mesh as meshes
from simclr_jax.benchmark import peak, timing
from simclr_jax.benchmark.task import Images
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack

# Sides of the matrices whose product gives the rate.
_PRODUCT_SIDE, _PRODUCT_SIDE_ON_CPU = 8192, 4096
_PRODUCTS = 3


class Steps:
    """The compiled steps of a checked recipe, for pretraining or with labels.

    Attributes:
      program: of as many steps as a run takes in one dispatch.
      compile_seconds: what it took to compile.
    """

    def __init__(self, config: Config, images: Pack, mesh: Mesh):
        """Makes the model and compiles its step; the images go to the devices of `mesh`."""
        plan = configs.derive(config, len(images))
        model = _build_model(config, len(images.class_names))
        begin = recipe.build_start(config, plan, model, mesh)
        self.config, self.begin, self.mesh = config, begin, mesh
        self.batches = recipe.build_batches(config, images, plan, mesh, first_step=0)
        self.key = jax.random.key(config.seed)
        self.state, self.done = begin.state, 0
        run_steps: Any = training.make_run_steps(
            recipe.build_step(config, begin, mesh), self.batches.fetch, meshes.replicated(mesh)
        )
        self._first = self.batches.call(0, 1)
        began = time.perf_counter()
        self.program = run_steps.lower(self.key, self.state, *self._first, jnp.int32(1)).compile()
        self.compile_seconds = time.perf_counter() - began

    def run(self, count: int) -> None:
        """Takes so many steps, to the end."""
        metrics = None
        while count:
            now = min(count, self.batches.steps_per_call)
            arrays = self.batches.call(self.done, now)
            self.state, metrics = self.program(self.key, self.state, *arrays, jnp.int32(now))
            self.done, count = self.done + now, count - now
        jax.block_until_ready((self.state, metrics))


class Ours:
    """The steps of a recipe and their parts, timed: the counterpart of `torch_train.Loaded`.

    `time` takes "step", or the name of a part: "input", "views", "gradient" or "update".
    """

    def __init__(self, config: Config, images: Images, class_names: tuple[str, ...]):
        """Compiles the step for the first device of this machine."""
        kept_memory.by_jax()  # as every command does
        pack = Pack(images.open_canvas(), images.extent, images.label, class_names, "images", 0)
        with timing.no_kept_compilations():
            self.steps = Steps(config, pack, one_device())
        self._parts: dict[str, Callable[[], Any]] | None = None

    def start(self) -> dict[str, float]:
        """Takes the first step; `start_seconds` is all that comes before the second."""
        began = time.perf_counter()
        self.steps.run(1)
        seconds = self.steps.compile_seconds + time.perf_counter() - began
        return {"start_seconds": seconds, "compile_seconds": self.steps.compile_seconds}

    def time(self, what: str, count: int) -> float:
        """Seconds of a step, or of a part of it by itself: the mean of `count`, after one that is not timed.

        Where others ran meanwhile, the first takes up to half as long again.
        """
        run = self.steps.run if what == "step" else partial(self._repeat, what)
        run(1)
        began = time.perf_counter()
        run(count)
        return (time.perf_counter() - began) / count

    def _repeat(self, part: str, count: int) -> None:
        if self._parts is None:
            self._parts = _parts(self.steps)
        found = None
        for _ in range(count):
            found = self._parts[part]()
            if jax.default_backend() == "cpu":  # which would compute several at once, one on each core
                jax.block_until_ready(found)
        jax.block_until_ready(found)

    def peak(self) -> int | None:
        """Bytes that a step takes at most, as `peak.of_call` tells it."""
        self._parts = None
        return peak.of_call(partial(self.steps.run, 1))


def _parts(steps: Steps) -> dict[str, Callable[[], Any]]:
    """Compiles the parts of a step, each a program of its own, and runs each once."""
    config, start, mesh, key = steps.config, steps.begin, steps.mesh, steps.key
    state = jax.tree.map(jnp.copy, steps.state)  # the step takes its own away
    make_views = recipe.build_views(config, mesh)
    labelled = config.stage != "pretrain"

    def views(batch: Any) -> Any:
        return make_views(training.image_keys(key, 0, batch.ids), batch.canvas, batch.extent)

    def gradient(params: Any, batch_stats: Any, batch: Any, views: Any) -> Any:
        return gradients.of_batch(
            params,
            batch_stats,
            batch,
            make_views=lambda batch: views,
            forward=partial(training.forward, start.graphdef),
            loss=recipe.build_loss(config, mesh),
            make_targets=lambda batch, views: (batch.label,) if labelled else (),
        )

    compiled = partial(jax.jit, compiler_options=training.compiler_options(mesh.devices.flat[0]))
    fetch, views, gradient = map(compiled, (steps.batches.fetch, views, gradient))
    update = partial(training.update, optimizer=start.optimizer)
    update = compiled(update, donate_argnums=(0, 1))  # as the step is given its state
    updated = jax.tree.map(jnp.copy, (state.params, state.opt_state))

    def next_batch() -> Any:
        arrays, indices = steps.batches.call(steps.done, 1)
        return fetch(arrays, indices[0])

    def next_update() -> Any:
        nonlocal updated
        *updated, norms = update(*updated, found)
        return updated, norms

    batch = next_batch()
    made = views(batch)
    found = gradient(state.params, state.batch_stats, batch, made).gradient
    parts: dict[str, Callable[[], Any]] = {
        "input": next_batch,
        "views": partial(views, batch),
        "gradient": partial(gradient, state.params, state.batch_stats, batch, made),
        "update": next_update,
    }
    for run in parts.values():
        jax.block_until_ready(run())
    return parts


def one_device() -> Mesh:
    """The first device of this machine, as what is compared uses one."""
    return meshes.mesh_of(jax.devices()[:1])


def machine() -> dict[str, Any]:
    """`timing.circumstances`, and the rates of products and copies that this machine reaches."""
    found = timing.circumstances()
    platform = found["hardware"]["platform"]
    side = _PRODUCT_SIDE_ON_CPU if platform == "cpu" else _PRODUCT_SIDE
    dtypes = ("float32",) if platform == "cpu" else ("float32", "bfloat16")
    rates = {dtype: max(timing.product_rates(side, _PRODUCTS, dtype).values()) for dtype in dtypes}
    return found | {
        "product_side": side,
        "product_flops_per_second": {name: round(rate) for name, rate in rates.items()},
        "copy_bytes_per_second": round(timing.copy_rate()),
    }


def least_work(config: Config, images: int, classes: int) -> dict[str, float]:
    """What every step of a recipe has to do, whoever takes it; nothing is compiled.

    Returns:
      `flops` of the step after its views, as `rehearsal.step_parts` counts them; `bytes` that have to move:
      the batch is read; views, the maps that the gradient needs, and gradients are written and read;
      weights and optimizer are read and written.
    """
    mesh = one_device()
    schedule = recipe.build_schedule(config, configs.derive(config, images))
    optimizer = recipe.build_optimizer(config, schedule)
    graphdef, state = training.create_state(nnx.eval_shape(lambda: _build_model(config, classes)), optimizer)
    start = recipe.Start(graphdef, state, optimizer, schedule)
    parts = rehearsal.step_parts(config, start, mesh)
    memory: footprint.Memory = rehearsal.estimate(config, start, mesh, data_bytes=0)
    return {
        "flops": float(sum(part.flops for part in parts if part.name != "views")),
        "bytes": float(memory.data + 2 * (memory.work + memory.state)),
    }


def _build_model(config: Config, classes: int) -> nnx.Module:
    model = recipe.build_model(config)
    return model if config.stage == "pretrain" else recipe.build_classifier(config, model, classes)
