"""Times training side by side with PyTorch's: the same network, loss, optimizer and ranges of the views.

    python -m simclr_jax.benchmark train [--FLAG=VALUE ...]

    --workloads=cifar10,imagenette128
                          or stl10, imagenette224, resnet50, supervised, logistic; by default all of them,
                          on a CPU these two and logistic
    --frameworks=ours,torchvision,kornia
                          whom to measure, see below
    --batch=0             images a step; 0: each workload's own, a smaller one on a CPU
    --steps=0             timed steps of a turn, after one that is not; 0: about a second's worth; of
                          torchvision at least two batches of each worker
    --repeats=5           timed turns of each
    --out=FILE.json       all figures, with versions, hardware, date, commit and configs

ours         the compiled step of `simclr_jax.train`
torchvision  PyTorch as people write it: PIL images in the workers of a DataLoader; fp16 on a GPU
kornia       PyTorch as an expert would: images and compiled views on the device, channels last, a fused
             optimizer, freed memory kept as by ours; on a GPU all of it compiled, and bf16

logistic is a fit of a linear classifier on embeddings, of torchvision in batches with AdamW, of kornia with
L-BFGS on all of them.
Images are those of the data set where it is prepared, else noise. One device is used.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags

from simclr_jax import augment
from simclr_jax import config as configs
from simclr_jax.benchmark import apart, jax_train, logistic, peak, timing, workloads
from simclr_jax.benchmark.task import Images, Task
from simclr_jax.benchmark.workloads import WORKLOADS
from simclr_jax.config import Config
from simclr_jax.errors import UserError
from simclr_jax.logs import say, write_json
from simclr_jax.table import Table, table_text

OURS = "ours"
FRAMEWORKS: Mapping[str, tuple[str, ...]] = {  # and the modules that they need
    OURS: (),
    "torchvision": ("torch", "torchvision"),
    "kornia": ("torch", "torchvision", "kornia"),
}
LOGISTIC = "logistic"
PARTS = ("input", "views", "gradient", "update")

_TURN_SECONDS = 1.0
_PART_SECONDS = 0.3
_MOST_OF_A_PART = 200  # in a turn

FLAGS = flags.FlagValues()
_WORKLOADS = flags.DEFINE_list("workloads", [], "What to train.", flag_values=FLAGS)
_FRAMEWORKS = flags.DEFINE_list("frameworks", list(FRAMEWORKS), "Whom to measure.", flag_values=FLAGS)
_BATCH = flags.DEFINE_integer("batch", 0, "Images a step; 0: its own.", 0, flag_values=FLAGS)
_STEPS = flags.DEFINE_integer("steps", 0, "Of a turn; 0: about a second's.", 0, flag_values=FLAGS)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed turns of each.", lower_bound=1, flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures.", flag_values=FLAGS)

Workers = Mapping[str, apart.Worker]


def left_out(frameworks: Sequence[str]) -> dict[str, str]:
    """Those of `frameworks` that cannot be measured, and why."""
    missing = {
        name: [module for module in FRAMEWORKS[name] if importlib.util.find_spec(module) is None]
        for name in frameworks
    }
    return {
        name: f"not installed: pip install {' '.join(modules)}"
        for name, modules in missing.items()
        if modules
    }


def start_workers(
    frameworks: Sequence[str], config: Config, images: workloads.Data, stack: contextlib.ExitStack
) -> dict[str, apart.Worker]:
    """A process for each framework, which has to be installed; `stack` ends them."""
    plan = configs.derive(config, len(images.pack))
    task = Task(
        config.to_dict(),
        0 if config.stage == "pretrain" else len(images.pack.class_names),
        plan.peak_learning_rate,
        plan.total_steps,
        augment.blur_kernel_size(config.views.size),
    )
    given = Images(images.file, np.asarray(images.pack.extent), np.asarray(images.pack.label))
    made = {
        OURS: ("jax_train", "Ours", config, given, images.pack.class_names),
        "torchvision": ("torch_train", "Loaded", task, given),
        "kornia": ("torch_train", "Resident", task, given),
    }
    found = {}
    for name in frameworks:
        module, *rest = made[name]
        found[name] = stack.enter_context(apart.Worker(f"simclr_jax.benchmark.{module}", *rest))
    return found


def measure(workers: Workers, *, batch: int, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Times the steps of each framework, and their parts, in turns, and measures their memory.

    Args:
      workers: by framework; who fails is left out of the rest.
      batch: images a step.
      steps: of a turn; 0 for about a second's worth.
      repeats: turns of each.

    Returns:
      By framework the figures for JSON: what `start` tells, `peak_bytes`, `steps_a_turn`, `ms` a step,
      `images_per_second`, and by part the medians `parts_ms`; or `not_run`, why, and the `traceback`.
    """
    group = apart.Group(workers)
    figures: dict[str, dict[str, Any]] = {}
    counts: dict[tuple[str, str], int] = {}
    for name in workers:
        figures[name] = {**(group.ask(name, "start") or {}), "peak_bytes": group.ask(name, "peak")}
        for what in ("step", *PARTS):
            seconds = group.time(name, what, 1)
            if name not in group.failed:
                counts[name, what] = _count(what, seconds, steps)
    times = timing.told_in_turns(
        {key: functools.partial(group.time, *key, count) for key, count in counts.items()}, repeats
    )
    for name in workers:
        if name in group.failed:
            figures[name] = group.not_run(name)
            continue
        step = times[name, "step"]
        rates = timing.Times(tuple(batch / seconds for seconds in step.seconds))
        parts = {part: round(1000 * times[name, part].median, 4) for part in PARTS}
        figures[name] |= {
            "steps_a_turn": counts[name, "step"],
            "ms": step.milliseconds(),
            "images_per_second": {
                "median": round(rates.median, 2),
                "least": round(min(rates.seconds), 2),
                "most": round(max(rates.seconds), 2),
            },
            "parts_ms": parts,
        }
    return figures


def _count(what: str, seconds: float, steps: int) -> int:
    """How many steps, or parts of one that take `seconds`, make a turn."""
    if what == "step":
        return steps or max(1, round(_TURN_SECONDS / seconds))
    return max(1, min(_MOST_OF_A_PART, round(_PART_SECONDS / max(seconds, 1e-9))))


def compare(
    figures: Mapping[str, Mapping[str, Any]],
    work: Mapping[str, float],
    *,
    product_rate: float,
    copy_rate: float,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Sets the figures of `measure` against each other and against what the machine could do at best.

    Args:
      figures: of `measure`.
      work: of `jax_train.least_work`.
      product_rate: floating-point operations a second in a product of matrices.
      copy_rate: bytes a second in a copy.

    Returns:
      The figures with `times_slower` than ours, if that was run, and `share_of_product_rate`; and the floor:
      `ms` and `bound`, "products" or "bytes", whichever takes longer.
    """
    ours = figures.get(OURS, {}).get("ms")
    found = {name: dict(one) for name, one in figures.items()}
    for one in found.values():
        if "ms" in one:
            seconds = one["ms"]["median"] / 1000
            one["share_of_product_rate"] = round(work["flops"] / seconds / product_rate, 4)
            if ours:
                one["times_slower"] = round(one["ms"]["median"] / ours["median"], 3)
    bounds = {"products": work["flops"] / product_rate, "bytes": work["bytes"] / copy_rate}
    bound = max(bounds, key=bounds.__getitem__)
    return found, {"ms": round(1000 * bounds[bound], 4), "bound": bound}


# -------------------------------------------------------------------------------- command line


def table(figures: Mapping[str, Any]) -> Table:
    """Of the figures of a workload, a row for each framework, and the floor."""
    batch, floor = figures["batch"], figures["floor"]
    rows = [[name, *_cells(one)] for name, one in figures["frameworks"].items()]
    rate = f"{1000 * batch / floor['ms']:,.1f}"
    by = floor["ms"] / figures["frameworks"][OURS]["ms"]["median"] if _was_run(figures, OURS) else None
    ratio = f"{timing.short(by)} x" if by else ""
    rows.append(["floor", rate, "", timing.short(floor["ms"]), *[""] * (len(_COLUMNS) - 4), ratio])
    notes = [f"Images: {figures['data']}", f"the floor is that of {floor['bound']}"]
    for name, one in figures["frameworks"].items():
        if "not_run" in one:
            notes.append(f"{name} was not run: {one['not_run']}")
        elif "threads" in one and figures["on_cpu"]:
            notes.append(f"{name} is fastest with {one['threads']} of {timing.cores()} threads")
        if "uncompiled" in one:
            notes.append(f"{name} could not be compiled: {one['uncompiled']}")
    return Table(
        f"{figures['name']}: {figures['about']}, {figures['side']} pixels, batch {batch}, {figures['dtype']}",
        ("", *_COLUMNS),
        rows,
        "; ".join(notes) + ".",
    )


_COLUMNS = (
    *("images/s", "least-most", "ms a step"),
    *PARTS,
    *("start s", "MB", "of rate", "of ours"),
)


def _was_run(figures: Mapping[str, Any], name: str) -> bool:
    return "ms" in figures["frameworks"].get(name, {})


def _cells(figures: Mapping[str, Any]) -> list[str]:
    if "not_run" in figures:
        return ["–"] * len(_COLUMNS)
    rate = figures["images_per_second"]
    memory = figures["peak_bytes"]
    return [
        f"{rate['median']:,.1f}",
        f"{rate['least']:,.1f}-{rate['most']:,.1f}",
        timing.short(figures["ms"]["median"]),
        *(timing.short(figures["parts_ms"][part]) for part in PARTS),
        timing.short(figures["start_seconds"]),
        "–" if memory is None else f"{memory / 1e6:,.0f}",
        f"{100 * figures['share_of_product_rate']:.0f} %",
        f"{figures['times_slower']:.2f} x" if "times_slower" in figures else "",
    ]


def main() -> int:
    """Runs the command line; returns the exit status."""
    load = os.getloadavg()[0]
    asked, out = _some("frameworks", _FRAMEWORKS.value, FRAMEWORKS), timing.checked_out(_OUT.value)
    known = (*WORKLOADS, LOGISTIC)
    chosen = _some("workloads", _WORKLOADS.value, known) if _WORKLOADS.value else None
    reasons = left_out(asked)
    frameworks = [name for name in asked if name not in reasons]
    if not frameworks:
        raise UserError("; ".join(f"{name} is {reason}" for name, reason in reasons.items()))
    # JAX would take three quarters of a GPU's memory at once, and leave PyTorch too little.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    # The devices are never touched here: of some, a single process can use one at a time.
    figures = peak.in_fresh_process(jax_train.machine)
    on_cpu = figures["hardware"]["platform"] == "cpu"
    if chosen is None:
        chosen = [*workloads.ON_CPU, LOGISTIC] if on_cpu else list(known)
    settings = {
        name: WORKLOADS[name].config(on_cpu=on_cpu, batch=_BATCH.value or None)
        for name in chosen
        if name != LOGISTIC
    }
    figures |= {
        "load_before": round(load, 2),
        "repeats": _REPEATS.value,
        "left_out": reasons,
        "workloads": {},
    }
    for text in _preface(figures, frameworks):
        say(text)
    for name, config in settings.items():
        found = _workload(name, config, frameworks, figures)
        figures["workloads"][name] = found
        say("")
        say(table_text(table(found)))
        if out is not None:
            write_json(out, figures)
    if LOGISTIC in chosen:
        figures[LOGISTIC] = logistic.measure(frameworks, _REPEATS.value)
        say("")
        say(table_text(logistic.table(figures[LOGISTIC])))
    if out is not None:
        write_json(out, figures)
    return 0


def _workload(
    name: str, config: Config, frameworks: Sequence[str], machine: Mapping[str, Any]
) -> dict[str, Any]:
    workload, batch = WORKLOADS[name], config.train.batch_size
    with contextlib.ExitStack() as stack:
        images = stack.enter_context(workloads.open_images(config, workload.images))
        count = len(images.pack)
        configs.derive(config, count)  # a batch that is too large is said before anything is run
        work = peak.in_fresh_process(jax_train.least_work, config, count, len(images.pack.class_names))
        workers = start_workers(frameworks, config, images, stack)
        measured = measure(workers, batch=batch, steps=_STEPS.value, repeats=_REPEATS.value)
    compared, floor = compare(
        measured,
        work,
        product_rate=machine["product_flops_per_second"][config.model.dtype],
        copy_rate=machine["copy_bytes_per_second"],
    )
    return {
        "name": name,
        "about": workload.about,
        "side": config.views.size,
        "batch": batch,
        "dtype": config.model.dtype,
        "on_cpu": machine["hardware"]["platform"] == "cpu",
        "data": images.about,
        "images": count,
        "least_work": work,
        "floor": floor,
        "frameworks": compared,
        "config": config.to_dict(),
    }


def _preface(figures: Mapping[str, Any], frameworks: Sequence[str]) -> list[str]:
    """The lines before the tables: where, what disturbs, who is missing, what is measured."""
    hardware = figures["hardware"]
    on_cpu, cores = hardware["platform"] == "cpu", hardware["cores"]
    rates = ", ".join(
        f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in figures["product_flops_per_second"].items()
    )
    precision = ("float32",) * 3 if on_cpu else ("bfloat16", "fp16 autocast", "all compiled, bf16 autocast")
    copied = figures["copy_bytes_per_second"] / 1e9
    said = {
        OURS: f"simclr_jax, the compiled step of a run, {precision[0]}",
        "torchvision": f"PyTorch, torchvision on PIL images in {cores} DataLoader workers, {precision[1]}",
        "kornia": f"PyTorch, images and Kornia's views, compiled, on the device, {precision[2]}",
        "floor": f"products at {rates} GFLOP/s (of {figures['product_side']} rows and columns), or bytes at",
        "": f"  {copied:,.1f} GB/s of a copy: views, maps that the gradient needs, weights, optimizer",
        "input": "ms, by itself: images to the device; of torchvision what a step waits for its batch",
        "views": "ms, by itself; of torchvision the loader alone, all cores on it",
        "gradient": "ms, by itself: encoder, head and loss, forward and backward",
        "update": "ms, by itself: the optimizer",
        "start s": "seconds to the end of the first step: compilation, or the start of the workers",
        "MB": "peak of a step: "
        + (
            "growth of the resident set of its process, the loader's workers not counted"
            if on_cpu
            else "on the device, images and weights included; of ours with what the compiler tried"
        ),
        "of rate": "FLOPs of a step without its views, over its time, as a share of the rate of products",
    }
    lines = timing.where(hardware, figures["load_before"])
    lines += [f"{name} is left out, {reason}" for name, reason in figures["left_out"].items()]
    return lines + [
        f"  {name:<12} {text}" for name, text in said.items() if name not in FRAMEWORKS or name in frameworks
    ]


def _some(flag: str, names: Sequence[str], known: Collection[str]) -> list[str]:
    if not names or not set(names) <= set(known):
        raise UserError(f"--{flag} must be some of {','.join(known)}; got {','.join(names)!r}")
    return [name for name in known if name in names]
