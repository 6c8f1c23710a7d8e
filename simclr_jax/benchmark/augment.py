"""Times the augmentation side by side with others': the whole chain, and each operation by itself.

    python -m simclr_jax.benchmark augment [--FLAG=VALUE ...]

    --sizes=32,96,128,224  sides of the images and of the views made of them, in pixels
    --images=512           images a pass; one view of each
    --operations=chain,hue rows of the table; default: chain, crop, brightness, contrast, saturation, hue,
                           jitter, grayscale, blur, solarize, normalize
    --repeats=5            timed passes of each, taken in turns
    --dtype=float32        of this package's views and float images; or bfloat16
    --libtpu=FOLDER        with the TPU's compiler: pip install --target FOLDER libtpu
    --out=FILE.json        all figures, with versions, hardware, date and commit

Everyone gets the same images, decoded and in place, and draws parameters for each image. A second table
tells what the compiler for a TPU, which needs no TPU, makes of the chain: bytes moved, memory, operations.
"""

import contextlib
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import dm_pix as pix
import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax import Array

from simclr_jax import augment
from simclr_jax.benchmark import compiled_chain, compilers, peers, pil_workers, timing, tpu
from simclr_jax.errors import UserError
from simclr_jax.logs import say, write_json

SMALLEST = 8  # pixels; no peer is made for less

FLAGS = flags.FlagValues()
_SIZES = flags.DEFINE_list(
    "sizes", ["32", "96", "128", "224"], "Sides of the images, in pixels.", flag_values=FLAGS
)
_IMAGES = flags.DEFINE_integer("images", 512, "Images a pass.", lower_bound=1, flag_values=FLAGS)
_OPERATIONS = flags.DEFINE_list("operations", list(peers.OPERATIONS), "Rows of the table.", flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed passes of each.", lower_bound=1, flag_values=FLAGS)
_DTYPE = flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16"], "Of views and float images.", flag_values=FLAGS
)
_LIBTPU = flags.DEFINE_string("libtpu", "", "Folder with libtpu.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures.", flag_values=FLAGS)

Rivals = Mapping[str, Callable[[str], Callable[[], object]]]


class Case(NamedTuple):
    """A function of arrays and its arguments."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class _Single(NamedTuple):
    """An operation of one image and the range its parameter is drawn from, here and in dm-pix."""

    fast: Callable[..., Any]
    plain: Callable[..., Any] | None
    fast_range: tuple[float, float] | None = None
    plain_range: tuple[float, float] | None = None


def _singles(size: int) -> dict[str, _Single]:
    kernel = augment.blur_kernel_size(size)

    def gray(function: Callable[[Array], Any]) -> Callable[[Array], Array]:
        return lambda image: jnp.broadcast_to(function(image), image.shape)

    factors, turns, sigmas = peers.FACTORS, peers.TURNS, peers.SIGMA
    delta = peers.STRENGTHS["brightness"]
    return {
        "brightness": _Single(
            augment.adjust_brightness, pix.adjust_brightness, factors, plain_range=(-delta, delta)
        ),
        "contrast": _Single(augment.adjust_contrast, pix.adjust_contrast, factors, factors),
        "saturation": _Single(augment.adjust_saturation, pix.adjust_saturation, factors, factors),
        "hue": _Single(augment.adjust_hue, pix.adjust_hue, turns, turns),
        "grayscale": _Single(
            gray(augment.rgb_to_grayscale), gray(functools.partial(pix.rgb_to_grayscale, keep_dims=True))
        ),
        "blur": _Single(
            lambda image, sigma: augment.gaussian_blur(image, sigma, kernel),
            lambda image, sigma: pix.gaussian_blur(image, sigma, kernel),
            sigmas,
            sigmas,
        ),
        "solarize": _Single(
            lambda image: augment.solarize(image, peers.THRESHOLD),
            lambda image: pix.solarize(image, peers.THRESHOLD),
        ),
        "normalize": _Single(lambda image: augment.normalize(image, peers.MEAN, peers.STD), None),
    }


def cases(operation: str, images: np.ndarray, dtype: str) -> dict[str, Case]:
    """What JAX does for a row of the table.

    `chain`, `crop` and `jitter` are `random_views` of uint8 images with the rest switched off; the jitter
    then has a crop before it that takes the whole image. The others are the function of one image under
    vmap, of float images, each with a parameter of its own.

    Args:
      operation: one of `peers.OPERATIONS`.
      images: uint8 [N, S, S, 3].
      dtype: of float images and of results.

    Returns:
      `fast`; `plain`, except for `normalize`, which dm-pix does not have; for the chain `tutorial`, which
      is float32 throughout, as there. Each maps to [N, S, S, 3].
    """
    size = images.shape[1]
    canvas = jnp.asarray(images)
    floats = canvas.astype(jnp.float32) / 255
    keys = jax.random.split(jax.random.key(0), len(images))
    singles = _singles(size)
    if operation in singles:
        single = singles[operation]

        def case(function: Callable[..., Any], interval: tuple[float, float] | None) -> Case:
            drawn = [jnp.linspace(*interval, len(images))] if interval else []
            return Case(jax.vmap(function), (floats.astype(dtype), *drawn))

        def through_float32(image: Array, *parameter: Array) -> Array:
            """As the fast form computes; dm-pix's blur does not take bfloat16."""
            assert single.plain is not None
            return single.plain(image.astype(jnp.float32), *parameter).astype(dtype)

        found = {"fast": case(single.fast, single.fast_range)}
        return found | ({"plain": case(through_float32, single.plain_range)} if single.plain else {})

    off = {
        "crop_area": (1.0, 1.0),
        "crop_aspect": (1.0, 1.0),
        "flip": 0,
        "jitter": 0,
        "grayscale": 0,
        "blur": 0,
    }
    only = {
        "chain": peers.CHAIN,
        "crop": off | {"crop_area": peers.AREA, "crop_aspect": peers.ASPECT, "flip": peers.FLIP},
        "jitter": off | {"jitter": peers.JITTER, **peers.STRENGTHS},
    }[operation]

    def views(form: str) -> Case:
        options = {"count": 1, "size": size, "form": form, "dtype": dtype} | only
        return Case(lambda keys, canvas: augment.random_views(keys, canvas, **options), (keys, canvas))

    found = {form: views(form) for form in ("fast", "plain")}
    if operation == "chain":
        found["tutorial"] = Case(jax.vmap(peers.tutorial_view), (keys, floats))
    return found


def measure(
    operation: str, images: np.ndarray, rivals: Rivals, *, dtype: str, repeats: int, copy_rate: float
) -> tuple[dict[str, timing.Times], dict[str, Any]]:
    """Times one operation on images [N, S, S, 3] by everyone who has it.

    Args:
      operation: one of `peers.OPERATIONS`.
      images: uint8 [N, S, S, 3].
      rivals: by name, functions that prepare an operation and return a function that runs it.
      dtype: as in `cases`.
      repeats: timed passes of each.
      copy_rate: bytes a second.

    Returns:
      The times, and the figures for JSON: milliseconds, images a second, compilation, floor.
    """
    programs = {
        name: timing.compiled(case.function, *case.arguments)
        for name, case in cases(operation, images, dtype).items()
    }
    runs = {name: program.run for name, program in programs.items()}
    runs |= {name: prepare(operation) for name, prepare in rivals.items()}
    times = timing.in_turns(runs, repeats)
    figures: dict[str, Any] = {"size": images.shape[1], "operation": operation, "peers": {}}
    figures["floor_ms"] = round(1000 * programs["fast"].moved_bytes / copy_rate, 4)
    for name, time in times.items():
        figures["peers"][name] = {
            "ms": time.milliseconds(),
            "images_per_second": round(len(images) / time.median, 1),
        }
        if name in programs:
            figures["peers"][name]["compile_seconds"] = round(programs[name].compile_seconds, 3)
    return times, figures


def rows(columns: Sequence[str], times: Mapping[str, timing.Times], figures: Mapping[str, Any]) -> list[str]:
    """The lines of the table for one operation; for the chain also images/s, ratios and compilation."""
    cells = [str(times[name]) if name in times else "-" for name in columns]
    table = [line(figures["operation"], cells, timing.short(figures["floor_ms"]))]
    if figures["operation"] == "chain":
        of = figures["peers"]
        ratios = {name: timing.short(time.median / times["fast"].median) for name, time in times.items()}
        compiled = [of[name].get("compile_seconds") for name in columns]
        table += [
            line("  images/s", [f"{of[name]['images_per_second']:,.0f}" for name in columns]),
            line("  fast is", ["" if name == "fast" else f"{ratios[name]} x" for name in columns]),
            line("  compile s", ["" if seconds is None else timing.short(seconds) for seconds in compiled]),
        ]
    return table


def line(label: str, cells: Sequence[str], floor: str = "") -> str:
    """A line of the table: 11 characters, 15 a cell, 8 for the floor."""
    return (f"{label:<11}" + "".join(f" {cell:>14}" for cell in cells) + f" {floor:>7}").rstrip()


def legend(columns: Sequence[str], dtype: str, copy_rate: float) -> list[str]:
    """What the columns are, a line each."""
    cores = timing.cores()
    gpu = not {"v2", "kornia"}.isdisjoint(columns) and peers.on_gpu()
    where = "on the GPU" if gpu else f"{cores} threads"
    said = {
        "fast": f'simclr_jax, form="fast", {dtype}',
        "plain": f'under vmap, {dtype}: form="plain" (the same views), or the dm-pix function of that name ¹',
        "tutorial": "the UvA tutorial's chain of dm-pix: no crop, weaker jitter in fixed order, blur always",
        "PIL": f"torchvision on PIL images, in {cores} processes of one thread",
        "v2": f"torchvision v2 on float tensors, {where}; one by one, as it draws once a call",
        "kornia": f"on a float batch, {where}; jitter order drawn once a batch, crop not antialiased",
    }
    return [
        *(f"  {name:<9} {said[name]}" for name in columns),
        f"  {'floor':<9} bytes in and out of fast at the rate of a copy, {copy_rate / 1e9:.1f} GB/s",
        "¹ of nearest meaning: brightness adds, contrast blends with each channel's mean, saturation scales",
        "  that of HSV, blur pads with zeros",
    ]


def main() -> int:
    """Runs the command line; returns the exit status."""
    load = os.getloadavg()[0]
    sizes, operations = _checked_sizes(_SIZES.value), _checked_operations(_OPERATIONS.value)
    out, libtpu = timing.checked_out(_OUT.value), tpu.find(_LIBTPU.value)
    if importlib.util.find_spec("torch"):
        # JAX would take three quarters of a GPU's memory at once, and leave PyTorch too little.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    torchvision, kornia = peers.import_torchvision(), peers.import_kornia()
    columns = ["fast", "plain", *(["tutorial"] if "chain" in operations else [])]
    columns += [*(["PIL", "v2"] if torchvision else []), *(["kornia"] if kornia else [])]

    with contextlib.ExitStack() as stack:
        stack.enter_context(timing.no_kept_compilations())
        workers = stack.enter_context(pil_workers.PilWorkers(timing.cores())) if torchvision else None
        copy_rate = timing.copy_rate()
        figures = timing.circumstances() | {
            "load_before": round(load, 2),
            "images": _IMAGES.value,
            "repeats": _REPEATS.value,
            "dtype": _DTYPE.value,
            "copy_bytes_per_second": round(copy_rate),
            "augment": [],
        }
        for text in _preface(figures, columns):
            say(text)
        for size in sizes:
            images = np.random.default_rng(0).integers(0, 256, (_IMAGES.value, size, size, 3), np.uint8)
            say(f"\n{len(images)} images of {size}x{size}, ms: median least-most")
            say(line("", columns, "floor"))
            others = rivals(images, workers, with_kornia=kornia is not None)
            for operation in operations:
                times, row = measure(
                    operation,
                    images,
                    others,
                    dtype=_DTYPE.value,
                    repeats=_REPEATS.value,
                    copy_rate=copy_rate,
                )
                figures["augment"].append(row)
                for text in rows(columns, times, row):
                    say(text)

    failed = False
    large = [size for size in sizes if size >= compiled_chain.SMALLEST]
    if "chain" in operations and large:
        say("")
        if libtpu is None:
            say("For a TPU's part: pip install --target FOLDER libtpu, and again with --libtpu=FOLDER")
        else:
            try:
                figures["tpu"] = compiled_chain.compile_apart(large, _IMAGES.value, libtpu)
                for text in compiled_chain.table(figures["tpu"]):
                    say(text)
            except compilers.CompilerError as error:
                print(f"error: {error}", file=sys.stderr)
                failed = True
    if out is not None:
        write_json(out, figures)
    return int(failed)


def rivals(images: np.ndarray, workers: pil_workers.PilWorkers | None, *, with_kornia: bool) -> Rivals:
    """The peers outside JAX that are installed, with `images` uint8 [N, S, S, 3] given to the workers."""
    kernel = augment.blur_kernel_size(images.shape[1])
    cores = timing.cores()
    found: dict[str, Callable[[str], Callable[[], object]]] = {}
    if workers is not None:
        workers.load(images)
        found["PIL"] = lambda operation: lambda: workers.run(operation, kernel)
        found["v2"] = lambda operation: peers.v2_pass(operation, images, kernel, cores)
    if with_kornia:
        found["kornia"] = lambda operation: peers.kornia_pass(operation, images, kernel, cores)
    return found


def _preface(figures: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    """The lines before the tables: where, what disturbs, who is missing, what the columns are."""
    lines = timing.where(figures["hardware"], figures["load_before"])
    if "PIL" not in columns:
        lines.append("left out, not installed: PIL and v2 (pip install torch torchvision)")
    if "kornia" not in columns:
        lines.append("left out, not installed: kornia (pip install kornia)")
    return lines + legend(columns, figures["dtype"], figures["copy_bytes_per_second"])


def _checked_sizes(texts: Sequence[str]) -> list[int]:
    try:
        sizes = [int(text) for text in texts]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < SMALLEST:
        raise UserError(
            f"--sizes must be numbers of pixels, at least {SMALLEST}, such as 32,96; got {','.join(texts)!r}"
        )
    return sizes


def _checked_operations(names: Sequence[str]) -> list[str]:
    unknown = [name for name in names if name not in peers.OPERATIONS]
    if unknown or not names:
        raise UserError(f"--operations must be some of {','.join(peers.OPERATIONS)}; got {','.join(names)!r}")
    return [name for name in peers.OPERATIONS if name in names]
