"""Measures the peak memory and the time of the contrastive loss, and of a recipe's training step.

    python -m simclr_jax.benchmark memory [--FLAG=VALUE ...]

    --views=4096,16384,65536,131072
                          rows of the loss, NT-Xent, plain and tiled; or none
    --width=128           numbers in a row
    --config=FILE         recipe of the step, by default configs/cifar10_cpu.py; after it
                          --config.KEY=VALUE sets keys
    --microbatches=2,4    in how many parts to compute the step's batch; or none
    --memory_gb=0         what needs more is compiled and not run; 0: half of what is free, of a GPU all
    --repeats=5           timed runs of each, taken in turns
    --seconds=60          for the timed runs of each; one that takes half of it or more is run once
    --out=FILE.json       all figures, with versions, hardware, date and commit

The loss is computed with its gradient, of float32 rows from a normal distribution; the step is that of
`simclr_jax.train`, of images of noise.
"""

import copy
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags
from jax.sharding import Mesh

from simclr_jax import losses, recipe, training
from simclr_jax import mesh as meshes
from simclr_jax.benchmark import jax_train, peak, recipes, timing, workloads
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.logs import say, write_json
from simclr_jax.table import Table, table_text

FORMS = ("plain", "tiled")
AS_IT_IS = "as it is"

RECIPE = "cifar10_cpu.py"  # of configs/, where --config names no other
_TEMPERATURE = 0.1
_MEMORY = pathlib.Path("/proc/meminfo")

FLAGS = flags.FlagValues()
recipes.define(FLAGS)
_VIEWS = flags.DEFINE_list("views", ["4096", "16384", "65536", "131072"], "Rows, or none.", flag_values=FLAGS)
_WIDTH = flags.DEFINE_integer("width", 128, "Numbers in a row.", lower_bound=1, flag_values=FLAGS)
_MICROBATCHES = flags.DEFINE_list("microbatches", ["2", "4"], "Parts, or none.", flag_values=FLAGS)
_MEMORY_GB = flags.DEFINE_float("memory_gb", 0.0, "What needs more is not run.", 0.0, flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed runs of each.", lower_bound=1, flag_values=FLAGS)
_SECONDS = flags.DEFINE_float("seconds", 60.0, "For the timed runs of each.", 0.0, flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures.", flag_values=FLAGS)


class Work(NamedTuple):
    """A compiled program, and how to run it."""

    program: jax.stages.Compiled
    start: Callable[[], Callable[[], object]]  # makes the arrays; what it returns runs once, to the end


def loss_work(views: int, width: int, form: str) -> Work:
    """NT-Xent and its gradient at float32 [views, width]; see `losses.nt_xent` for the form."""
    loss = functools.partial(losses.nt_xent, temperature=_TEMPERATURE, form=form)
    shape = jax.ShapeDtypeStruct((views, width), jnp.float32)
    program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(shape).compile()

    def start() -> Callable[[], object]:
        z = jax.random.normal(jax.random.key(0), shape.shape)
        return lambda: jax.block_until_ready(program(z))

    return Work(program, start)


def step_work(config: Config) -> Work:
    """The training step of a checked recipe for pretraining, as a run takes it."""
    steps = jax_train.Steps(config, _images(config), _mesh(config))
    return Work(steps.program, lambda: functools.partial(steps.run, 1))


def views_work(config: Config) -> Work:
    """The views of a step's batch alone."""
    mesh = _mesh(config)
    images = _images(config)
    split = meshes.split(mesh)
    keys = training.image_keys(jax.random.key(config.seed), 0, jnp.arange(len(images)))
    data = jax.device_put((keys, images.canvas, images.extent), split)
    program = jax.jit(recipe.build_views(config, mesh)).lower(*data).compile()
    return Work(program, lambda: lambda: jax.block_until_ready(program(*data)))


def variants(config: Config, counts: Sequence[int]) -> dict[str, Config]:
    """The recipe as it is, in microbatches, and with `train.remat`, by name.

    Args:
      config: a checked recipe for pretraining.
      counts: numbers of microbatches. Their BatchNorm takes the statistics of each.

    Raises:
      UserError: if a batch cannot be cut into that many.
    """
    found = {AS_IT_IS: config}
    for count in counts:
        part = copy.deepcopy(config)
        if config.train.batch_size % count:
            raise UserError(
                f"--microbatches has {count}, of which config.train.batch_size={config.train.batch_size} is "
                "no multiple"
            )
        part.train.microbatch_size = config.train.batch_size // count
        if config.model.batch_norm == "batch":
            part.model.batch_norm = "microbatch"
        found[f"{count} microbatches"] = part
    if not config.train.remat:
        found["remat"] = copy.deepcopy(config)
        found["remat"].train.remat = True
    return found


def try_apart(make: Callable[[], Work], memory_gb: float) -> dict[str, Any]:
    """Compiles a program and, where its memory allows, runs it once, in a fresh process.

    Args:
      make: compiles; pickled.
      memory_gb: the most that it may need, in GB; 0 for half of what is free, or all that a GPU has.

    Returns:
      `temporary_bytes`, by the compiler; `needed_bytes`, arguments and results included. After a run
      `extra_bytes`, as `peak.of_call` tells it of the run alone, and `seconds`; else `not_run`, why.

    Raises:
      UserError: if the system does not tell what is free and `memory_gb` is 0.
    """
    kept = jax.config.values["jax_compilation_cache_dir"]
    try:
        return peak.in_fresh_process(_try, make, memory_gb, kept)
    except (MemoryError, BrokenProcessPool):
        return {"not_run": "its process got too little memory"}


def _try(make: Callable[[], Work], memory_gb: float, kept: str | None) -> dict[str, Any]:
    jax.config.update("jax_compilation_cache_dir", kept)  # what is timed later is not compiled once more
    found: dict[str, Any] = {}
    seconds: list[float] = []
    try:
        work = make()
        memory: Any = work.program.memory_analysis()
        found["temporary_bytes"] = memory.temp_size_in_bytes
        found["needed_bytes"] = needed = (
            memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
        )
        limit = 1e9 * memory_gb or free_bytes()
        if needed > limit:
            return found | {
                "not_run": f"needs {timing.short(needed / 1e9)} GB of {timing.short(limit / 1e9)}"
            }
        run = work.start()

        def once() -> None:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)

        found["extra_bytes"] = peak.of_call(once)
        if not seconds:  # where the peak is not told, nothing was run
            once()
        return found | {"seconds": seconds[0]}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"not_run": "it got too little memory"}


def free_bytes() -> float:
    """Half of what is free of this machine's memory, or all that its accelerator has for programs.

    Raises:
      UserError: if the system, or the device, does not tell.
    """
    if jax.default_backend() != "cpu":
        found = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    else:
        lines = _MEMORY.read_text().splitlines() if _MEMORY.is_file() else []
        found = next((512 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    if found is None:
        raise UserError("how much memory is free cannot be told here; set --memory_gb")
    return found


def timed(
    works: Mapping[str, Callable[[], Work]],
    tried: Mapping[str, Mapping[str, Any]],
    *,
    repeats: int,
    seconds: float,
) -> dict[str, dict[str, Any]]:
    """Times the programs that were run, in turns those that are quick enough.

    Args:
      works: what makes each, by name.
      tried: of `try_apart`, by the same names. Its run is the one that counts where there is time for one.
      repeats: the most timed runs of each.
      seconds: the most that the timed runs of one may take together.

    Returns:
      The figures for JSON, by name: those of `tried`, and where it was run `ms`, `runs`, how many were timed,
      and `times_slower` than the first, if that was run.
    """
    once = {name: found["seconds"] for name, found in tried.items() if "seconds" in found}
    times = {name: timing.Times((taken,)) for name, taken in once.items()}
    quick = {name: taken for name, taken in once.items() if 2 * taken <= seconds}
    if quick:
        rounds = min(repeats, int(seconds / max(quick.values())))
        times |= timing.in_turns({name: works[name]().start() for name in quick}, rounds)
    first = times.get(next(iter(works)))
    figures = {name: dict(found) for name, found in tried.items()}
    for name, taken in times.items():
        del figures[name]["seconds"]
        figures[name] |= {"ms": taken.milliseconds(), "runs": len(taken.seconds)}
        if first:
            figures[name]["times_slower"] = round(taken.median / first.median, 3)
    return figures


# -------------------------------------------------------------------------------- command line


def loss_table(width: int, found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Of the figures of `timed` by rows and form."""
    rows = [
        [f"{int(views):,}", form, *_cells(figures)]
        for views, forms in found.items()
        for form, figures in forms.items()
    ]
    caption = f"NT-Xent and its gradient, float32, width {width}"
    return Table(caption, ("views", "form", *_COLUMNS, "of plain", ""), rows)


def step_table(config: Config, found: Mapping[str, Mapping[str, Any]]) -> Table:
    """Of the figures of `timed` by variant of a recipe."""
    caption = (
        f"A training step of {config.train.batch_size} images, views of {config.views.size} pixels, "
        f"ResNet-{config.model.depth} of width {config.model.width:g}"
    )
    rows = [[name, *_cells(figures)] for name, figures in found.items()]
    return Table(caption, ("step", *_COLUMNS, "of the first", ""), rows)


_COLUMNS = ("compiler MB", "peak MB", "s: median", "least", "most")


def _cells(figures: Mapping[str, Any]) -> list[str]:
    def megabytes(name: str) -> str:
        return f"{figures[name] / 1e6:,.1f}" if figures.get(name) is not None else "–"

    memory = [megabytes("temporary_bytes"), megabytes("extra_bytes")]
    if "not_run" in figures:
        return [*memory, *"––––", f"not run: {figures['not_run']}"]
    times = [timing.short(figures["ms"][name] / 1000) for name in ("median", "least", "most")]
    slower = f"{figures['times_slower']:.2f} x" if "times_slower" in figures else "–"
    return [*memory, *times, slower, "timed once" if figures["runs"] == 1 else ""]


def main() -> int:
    """Runs the command line; returns the exit status."""
    load = os.getloadavg()[0]
    views, counts = _numbers("views", _VIEWS.value, 4), _numbers("microbatches", _MICROBATCHES.value, 2)
    if odd := [rows for rows in views if rows % 2]:
        raise UserError(f"--views has {odd[0]}; two views of each image are an even number of rows")
    out, config = timing.checked_out(_OUT.value), recipes.read(FLAGS)
    works: dict[str, dict[str, Callable[[], Work]]] = {
        str(rows): {form: functools.partial(loss_work, rows, _WIDTH.value, form) for form in FORMS}
        for rows in views
    }
    steps = {name: functools.partial(step_work, one) for name, one in variants(config, counts).items()}
    works["step"] = steps | {"views alone": functools.partial(views_work, config)}

    # All of them first, while none of a GPU's memory is taken here.
    say("each is run in a fresh process first; the largest take minutes")
    tried = {
        name: {form: try_apart(make, _MEMORY_GB.value) for form, make in forms.items()}
        for name, forms in works.items()
    }
    figures = timing.circumstances() | {
        "load_before": round(load, 2),
        "width": _WIDTH.value,
        "memory_gb": _MEMORY_GB.value,
        "repeats": _REPEATS.value,
        "seconds": _SECONDS.value,
        "config": config.to_dict(),
    }
    for text in _preface(figures):
        say(text)
    found = {
        name: timed(forms, tried[name], repeats=_REPEATS.value, seconds=_SECONDS.value)
        for name, forms in works.items()
    }
    figures["step"] = found.pop("step")
    figures["loss"] = found
    tables = [step_table(config, figures["step"])]
    if found:
        tables.insert(0, loss_table(_WIDTH.value, found))
    for table in tables:
        say("")
        say(table_text(table))
    if out is not None:
        write_json(out, figures)
    return 0


def _preface(figures: Mapping[str, Any]) -> list[str]:
    """The lines before the tables: where, what disturbs, what is measured."""
    hardware = figures["hardware"]
    on_cpu = hardware["platform"] == "cpu"
    beyond = "beyond what was resident before" if on_cpu else "on the device, arrays included"
    said = {
        "compiler": "temporary memory that it reserves for the program",
        "peak": f"of one run in a fresh process, compiling apart, {beyond}",
        "s": f"in turns, at most {figures['repeats']} runs of each, and {figures['seconds']:g} s",
    }
    return [
        *timing.where(hardware, figures["load_before"]),
        *(f"  {name:<9} {text}" for name, text in said.items()),
    ]


def _numbers(flag: str, texts: Sequence[str], least: int) -> list[int]:
    if list(texts) == ["none"]:
        return []
    if not texts or not all(text.isdecimal() and int(text) >= least for text in texts):
        raise UserError(f"--{flag} must be none or numbers from {least} on; got {','.join(texts)!r}")
    return [int(text) for text in texts]


def _images(config: Config) -> Pack:
    return workloads.noise(config.train.batch_size, config.data.canvas_size)


def _mesh(config: Config) -> Mesh:
    return meshes.data_mesh(config.train.microbatch_size or config.train.batch_size)
