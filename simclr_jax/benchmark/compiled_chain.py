"""What the compiler for a TPU makes of the chain, on a machine without one.

    python -m simclr_jax.benchmark.compiled_chain --sizes=96,224 --images=512

prints JSON. It runs where the compiler is (`tpu.environment`), started by `compile_apart`.
"""

import argparse
import functools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from simclr_jax import augment
from simclr_jax.benchmark import compilers, peers, tpu

SMALLEST = 96  # pixels; below, views are so small that what they move says little
TARGET = "v5e"


def compile_apart(sizes: Sequence[int], images: int, folder: str) -> dict[str, Any]:
    """Compiles the forms of the chain for a TPU in a process of its own.

    Args:
      sizes: sides of the views, in pixels.
      images: of a batch.
      folder: as for `tpu.find`.

    Returns:
      `target`, `compiler` with its version, and `programs`, as from `compile_chain`.

    Raises:
      CompilerError: if the process fails.
      UserError: as `tpu.environment`.
    """
    arguments = [f"--sizes={','.join(map(str, sizes))}", f"--images={images}"]
    return compilers.apart(__spec__.name, arguments, tpu.environment(folder), name="TPU")


def table(found: Mapping[str, Any]) -> list[str]:
    """The lines of the table of what `compile_apart` returned."""
    programs = found["programs"]
    lines = [
        f"Compiled for one TPU {found['target']} ({found['compiler']}), not run; the chain,",
        f"{programs[0]['images']} images, one view of each",
        f"{'':<16}{'pixels':>8}{'moved GB':>10}{'of plain':>10}{'in+out GB':>11}"
        f"{'memory MB':>11}{'GFLOP':>9}{'compile s':>11}",
    ]
    first: dict[int, int] = {}
    for program in programs:
        reference = first.setdefault(program["size"], program["bytes_accessed"])
        label = f"{program['form']} {program['dtype']}"
        lines.append(
            f"{label:<16}{program['size']:>8}{program['bytes_accessed'] / 1e9:>10.3f}"
            f"{program['bytes_accessed'] / reference:>8.2f} x"
            f"{program['input_output_bytes'] / 1e9:>11.3f}{program['temporary_bytes'] / 1e6:>11.1f}"
            f"{program['flops'] / 1e9:>9.1f}{program['compile_seconds']:>11.1f}"
        )
    return lines


def compile_chain(size: int, images: int, device: Any) -> list[dict[str, Any]]:
    """Compiles the chain in each form for `device`.

    Returns:
      For each form and type: bytes accessed, of inputs and outputs, of temporary memory; floating-point
      operations; and the seconds that compiling took.
    """
    here = SingleDeviceSharding(device)
    keys = jax.ShapeDtypeStruct((images, 2), jnp.uint32, sharding=here)
    pixels = jax.ShapeDtypeStruct((images, size, size, 3), jnp.uint8, sharding=here)
    floats = jax.ShapeDtypeStruct(pixels.shape, jnp.float32, sharding=here)

    def views(keys: jax.Array, canvas: jax.Array, form: str, dtype: str) -> jax.Array:
        options: dict[str, Any] = {"count": 1, "size": size, "form": form, "dtype": dtype} | peers.CHAIN
        return augment.random_views(jax.random.wrap_key_data(keys), canvas, **options)

    def tutorial(keys: jax.Array, images: jax.Array) -> jax.Array:
        return jax.vmap(peers.tutorial_view)(jax.random.wrap_key_data(keys), images)

    forms: list[tuple[str, str, Callable[..., jax.Array], jax.ShapeDtypeStruct]] = [
        ("plain", "float32", functools.partial(views, form="plain", dtype="float32"), pixels),
        ("tutorial", "float32", tutorial, floats),
        ("fast", "float32", functools.partial(views, form="fast", dtype="float32"), pixels),
        ("fast", "bfloat16", functools.partial(views, form="fast", dtype="bfloat16"), pixels),
    ]
    found = []
    for form, dtype, function, canvas in forms:
        start = time.perf_counter()
        program = jax.jit(function).lower(keys, canvas).compile()
        seconds = time.perf_counter() - start
        costs: Any = program.cost_analysis()
        memory: Any = program.memory_analysis()
        found.append(
            {
                "form": form,
                "dtype": dtype,
                "size": size,
                "images": images,
                "bytes_accessed": round(costs["bytes accessed"]),
                "flops": round(costs["flops"]),
                "temporary_bytes": memory.temp_size_in_bytes,
                "input_output_bytes": sum(
                    array.size * array.dtype.itemsize for array in (keys, canvas, program.out_info)
                ),
                "compile_seconds": round(seconds, 2),
            }
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Compiles for the sizes on the command line and prints JSON."""
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    parser.add_argument("--sizes", default="96,224")
    parser.add_argument("--images", type=int, default=512)
    chosen = parser.parse_args(arguments)
    (device,) = tpu.devices(TARGET, [1])
    programs = [
        program
        for size in chosen.sizes.split(",")
        for program in compile_chain(int(size), chosen.images, device)
    ]
    print(json.dumps({"target": TARGET, "compiler": tpu.compiler(), "programs": programs}))


if __name__ == "__main__":
    main()
