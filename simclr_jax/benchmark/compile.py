"""The training step of a recipe, compiled for an accelerator that is not there: does it fit.

    python -m simclr_jax.benchmark compile --target=h100 [--config configs/imagenette.py] [--FLAG=VALUE ...]

    --target=v5e            a TPU v5e; or a GPU: t4, l4, a100, h100
    --slices=1,2x4          how many of them, which is the default for TPUs: one, and eight in 2 rows of 4
    --config=FILE           the recipe, by default configs/imagenette.py; --config.KEY=VALUE sets its keys
    --images=10000          of the data set, which lies on the chips where config.run.memory_gb allows
    --libtpu=FOLDER         where the compiler for TPUs is: pip install --target FOLDER libtpu; that for GPUs
                            comes with: pip install "jax[cuda13]"
    --out=FILE              the figures as JSON

Nothing is run. The memory is what the compiler reserves on each chip: weights and optimizer, images, work. On
a GPU convolutions may take more for themselves, once the fastest of them are looked for there.
"""

import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import flags

from simclr_jax import config as configs
from simclr_jax import footprint, recipe, training, workdirs
from simclr_jax import mesh as meshes
from simclr_jax.benchmark import compilers, gpu, recipes, timing, tpu
from simclr_jax.config import Config
from simclr_jax.errors import UserError
from simclr_jax.logs import say, write_json
from simclr_jax.table import Table, table_text


class Target(NamedTuple):
    """What is compiled for."""

    name: str
    limit: float  # bytes that programs may have on each
    slices: tuple[str, ...]  # how many of them, where --slices does not say
    devices: Callable[[str, Sequence[int]], Sequence[Any]]  # of this key of TARGETS, and so many
    compiler: Callable[[], str | None]  # with its version
    environment: Callable[[], Mapping[str, str]]  # of the process with the compiler


RECIPE = "imagenette.py"  # of configs/, where --config names no other

FLAGS = flags.FlagValues()
recipes.define(FLAGS)
_TARGET = flags.DEFINE_string("target", "v5e", "Chip.", flag_values=FLAGS)
_SLICES = flags.DEFINE_list("slices", [], "Chips of each.", flag_values=FLAGS)
_IMAGES = flags.DEFINE_integer("images", 10_000, "Of the data set.", lower_bound=2, flag_values=FLAGS)
_LIBTPU = flags.DEFINE_string("libtpu", "", "Folder with libtpu.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file.", flag_values=FLAGS)

# Of a GPU JAX takes three quarters (XLA_PYTHON_CLIENT_MEM_FRACTION). Of a TPU v5e, which has 16 GiB
# (https://cloud.google.com/tpu/docs/v5e), its compiler says so.
TARGETS: Mapping[str, Target] = {
    "v5e": Target(
        name="TPU v5e",
        limit=15.75 * 2**30,
        slices=("1", "2x4"),
        devices=tpu.devices,
        compiler=tpu.compiler,
        environment=lambda: tpu.environment(_LIBTPU.value),
    ),
    **{
        name: Target(
            name=chip.name,
            limit=0.75 * chip.memory_bytes,
            slices=("1",),
            devices=gpu.devices,
            compiler=gpu.compiler,
            environment=gpu.environment,
        )
        for name, chip in gpu.GPUS.items()
    },
}


def compile_step(config: Config, images: int, devices: Sequence[Any]) -> dict[str, Any]:
    """Compiles the step of a pretraining recipe for `devices`, without arrays.

    Args:
      config: a checked config.
      images: of its data set.
      devices: as of a topology.

    Returns:
      `chips`, `batch_size`, `microbatch_size`, `view_size`; `compile_seconds`; and either bytes on each chip,
      `state_bytes`, `data_bytes`, `work_bytes`, `total_bytes`, or `too_large`, what the compiler says.
    """
    mesh = meshes.mesh_of(devices)
    start = recipe.abstract_start(config, configs.derive(config, images), mesh)
    step = recipe.build_step(config, start, mesh)
    arrays, fetch, indices = recipe.abstract_batches(config, images, mesh)
    run_steps = training.make_run_steps(step, fetch, meshes.replicated(mesh))
    everywhere = meshes.replicated(mesh)
    key = jax.ShapeDtypeStruct((), jax.random.key(0).dtype, sharding=everywhere)
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    about = {
        "chips": len(devices),
        "batch_size": config.train.batch_size,
        "microbatch_size": config.train.microbatch_size or config.train.batch_size,
        "view_size": config.views.size,
    }
    began = time.perf_counter()
    try:
        traced = run_steps.trace(key, start.state, arrays, indices, count)
        program = traced.lower(lowering_platforms=(_platform(devices[0]),)).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return about | {"too_large": " ".join(str(error).split())[:300]}
    memory = footprint.compiled_memory(program, start.state)
    return about | {
        "compile_seconds": round(time.perf_counter() - began, 1),
        **{f"{name}_bytes": value for name, value in memory._asdict().items()},
        "total_bytes": memory.total,
    }


def _platform(device: Any) -> str:
    """As `lower` has it, which takes "gpu" for one that is there."""
    return "cuda" if device.platform == "gpu" else device.platform


def table(found: Mapping[str, Any]) -> Table:
    """Of what the process with the compiler printed."""
    target = TARGETS[found["target"]]
    rows = []
    for program in found["programs"]:
        sizes = [f"{program[name]:,}" for name in ("chips", "batch_size", "microbatch_size", "view_size")]
        if "too_large" in program:
            rows.append([*sizes, *"–––––", "no"])
            continue
        memory = [f"{program[f'{name}_bytes'] / 1e9:.2f}" for name in ("state", "data", "work", "total")]
        fits = "yes" if program["total_bytes"] <= target.limit else "no"
        rows.append([*sizes, f"{program['compile_seconds']:.0f}", *memory, fits])
    columns = (
        *("chips", "batch", "microbatch", "pixels", "compile s"),
        *("state", "images", "work", "GB a chip", "fits"),
    )
    where = f"{target.name} with {target.limit / 1e9:.1f} GB for programs ({found['compiler']})"
    return Table(f"Compiled for {where}, not run", columns, rows)


def main() -> int:
    """Runs the command line; returns the exit status."""
    target = _TARGET.value
    if target not in TARGETS:
        raise UserError(f"--target is {target!r}; known are {', '.join(TARGETS)}")
    out, environment = timing.checked_out(_OUT.value), TARGETS[target].environment()
    slices = _SLICES.value or TARGETS[target].slices
    settings = recipes.read(FLAGS)
    for chips in (math.prod(_sides(text)) for text in slices):
        if (settings.train.microbatch_size or settings.train.batch_size) % chips:
            raise UserError(
                f"{chips} chips cannot share a batch of {settings.train.batch_size} images evenly"
            )
    with tempfile.TemporaryDirectory() as folder:
        workdirs.create(pathlib.Path(folder), settings)
        arguments = [folder, target, ",".join(slices), str(_IMAGES.value)]
        try:
            found = compilers.apart(__spec__.name, arguments, environment, name=TARGETS[target].name)
        except compilers.CompilerError as error:
            raise UserError(str(error)) from error
    say(table_text(table(found)))
    for program in found["programs"]:
        if "too_large" in program:
            say(f"{program['chips']} chips: {program['too_large']}")
    if out is not None:
        write_json(out, timing.circumstances() | found)
    return 0


def _sides(text: str) -> tuple[int, ...]:
    """Of a slice: 2x4 has 2 and 4, and 3 chips have one."""
    sides = text.split("x")
    if not all(side.isdecimal() and int(side) for side in sides):
        raise UserError(f"--slices has {text!r}; name numbers of chips such as 1 or 2x4")
    return tuple(map(int, sides))


def _compile_all(folder: str, target: str, slices: str, images: str) -> dict[str, Any]:
    """What the process with the compiler prints."""
    settings, chip = workdirs.read_config(pathlib.Path(folder)), TARGETS[target]
    programs = [
        compile_step(settings, int(images), chip.devices(target, _sides(text))) for text in slices.split(",")
    ]
    return {"target": target, "compiler": chip.compiler(), "programs": programs}


if __name__ == "__main__":
    print(json.dumps(_compile_all(*sys.argv[1:])))
