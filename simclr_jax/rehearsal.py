"""What a run takes, told before it does: the table of `--dry-run`, and what to do where memory is short."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from simclr_jax import flops, footprint, recipe
from simclr_jax.config import Config
from simclr_jax.footprint import Memory, Part
from simclr_jax.recipe import Start
from simclr_jax.table import Table, table_text


def describe(config: Config, start: Start, mesh: Mesh, program: jax.stages.Compiled) -> str:
    """The parts of a run's step, and the memory that its compiled `program` takes of a device."""
    found = step_parts(config, start, mesh)
    found.append(
        Part("in all", sum(part.parameters for part in found), sum(part.flops for part in found)),
    )
    rows = [
        (part.name, f"{part.parameters:,}" if part.parameters else "–", f"{part.flops / 1e9:,.2f}")
        for part in found
    ]
    note = "GFLOP of a step's convolutions and products, before the compiler changes anything"
    if config.train.remat:
        note += "; the gradient's have what is computed again"
    memory = footprint.compiled_memory(program, start.state)
    return "\n".join(
        [
            table_text(Table("A training step", ("part", "parameters", "GFLOP"), rows, note + ".")),
            "",
            table_text(memory_table(memory)),
        ]
    )


def step_parts(config: Config, start: Start, mesh: Mesh) -> list[Part]:
    """The parts of a run's step: its views, and those that `footprint.step_parts` counts."""

    # As the paper has it: in tiles similarities are computed again for the gradient.
    plain = copy.deepcopy(config)
    plain.loss.form = "plain"

    def loss(outputs: jax.Array) -> jax.Array:
        labels = jnp.zeros(len(outputs), jnp.int32)
        targets = {"pretrain": (), "finetune": (labels,), "distill": (outputs, labels)}[config.stage]
        return recipe.build_loss(plain, mesh)(outputs, *targets)[0]

    microbatches = recipe.microbatches(config) > 1  # for which views are made twice
    views = flops.count(recipe.build_views(config, mesh), *_batch_shapes(config))
    return [
        Part("views", 0, 2 * views if microbatches else views),
        *footprint.step_parts(
            start.graphdef,
            start.state,
            views=_view_shapes(config, mesh),
            loss=loss,
            microbatches=microbatches,
        ),
    ]


def memory_table(memory: Memory) -> Table:
    """Bytes of each device by what they are for."""
    named = {
        "weights and optimizer": memory.state,
        "images": memory.data,
        "work": memory.work,
        "in all": memory.total,
    }
    rows = [(name, f"{value / 1e6:,.1f}") for name, value in named.items()]
    return Table("Memory of each device, by the compiler", ("", "MB"), rows)


def estimate(
    config: Config, start: Start, mesh: Mesh, *, data_bytes: int, parts: int | None = None
) -> Memory:
    """About what a step takes of each device, with the batch in so many parts; by default the config's."""
    views = _view_shapes(config, mesh)
    share = [jax.ShapeDtypeStruct((len(v) // mesh.size, *v.shape[1:]), v.dtype) for v in views]
    return footprint.estimated_memory(
        start.graphdef,
        start.state,
        share,
        parts=parts or recipe.microbatches(config),
        data_bytes=data_bytes + _batch_bytes(config) // mesh.size,
    )


def out_of_memory(config: Config, start: Start, mesh: Mesh, *, data_bytes: int) -> str:
    """One line on a step that did not fit: its batch and views, about what it takes, what to change."""
    limit = (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")
    now = estimate(config, start, mesh, data_bytes=data_bytes).total
    settings = []
    part = _smaller_part(config, start, mesh, data_bytes, 0.8 * limit if limit else 0.5 * now)
    if part:
        norm = " --config.model.batch_norm=microbatch" if config.model.batch_norm == "batch" else ""
        settings.append(f"--config.train.microbatch_size={part}{norm}")
    if config.model.dtype != "bfloat16":
        settings.append("--config.model.dtype=bfloat16")
    if not config.train.remat:
        settings.append("--config.train.remat=True")
    settings += ["a smaller --config.train.batch_size", "a smaller --config.views.size"]
    has = f" of the device's {_giga(limit)} GB" if limit else ""
    return (
        f"out of memory: a batch of {config.train.batch_size:,} images with views of {config.views.size} "
        f"pixels takes about {_giga(now)} GB{has}; set {settings[0]}, or {settings[1]}, or {settings[2]}"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or its compiler, says that there is too little memory."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def _smaller_part(config: Config, start: Start, mesh: Mesh, data_bytes: int, limit: float) -> int | None:
    """The largest microbatch below today's that fits `limit` bytes, or else the smallest there is."""
    batch_size = config.train.batch_size
    today = batch_size // recipe.microbatches(config)
    fitting = None
    for part in range(today - 1, 1, -1):
        if batch_size % part or part % mesh.size:
            continue
        fitting = part
        if estimate(config, start, mesh, data_bytes=data_bytes, parts=batch_size // part).total <= limit:
            break
    return fitting


def _view_shapes(config: Config, mesh: Mesh) -> Any:
    """Of a batch, one array a pass."""
    return jax.eval_shape(recipe.build_views(config, mesh), *_batch_shapes(config))


def _batch_shapes(config: Config) -> tuple[jax.ShapeDtypeStruct, ...]:
    """What views are made of: keys, canvas and extent."""
    count, side = config.train.batch_size, config.data.canvas_size
    return (
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), count)),
        jax.ShapeDtypeStruct((count, side, side, 3), jnp.uint8),
        jax.ShapeDtypeStruct((count, 2), jnp.int32),
    )


def _batch_bytes(config: Config) -> int:
    return config.train.batch_size * config.data.canvas_size**2 * 3


def _giga(number: float) -> str:
    return f"{number / 1e9:,.2g}" if number < 1e10 else f"{number / 1e9:,.0f}"
