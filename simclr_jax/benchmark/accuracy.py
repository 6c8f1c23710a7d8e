"""Measures the minutes that a recipe takes to an accuracy, everything included.

    python -m simclr_jax.benchmark accuracy [--target=90] [--config.KEY=VALUE ...] [--FLAG=VALUE ...]

    --target=90           per cent of the queries, by default the test split, that are classified right
    --metric=knn          by k nearest neighbours; knn1: by the nearest
    --k=10                neighbours of knn; takes the place of config.evaluation.k
    --every=10            epochs from one evaluation to the next
    --config=FILE         recipe, by default configs/cifar10.py; after it --config.KEY=VALUE sets keys
    --workdir=DIR         keeps the run in a new folder; by default it is in a temporary one
    --out=FILE.json       all figures, with versions, hardware, date and commit

The run is that of `simclr_jax.train`, and ends with the first evaluation that reaches the target. The last
evaluation counts, not the best. Minutes are those of the clock, from the beginning to the end of an
evaluation: images packed anew, programs compiled anew, steps, checkpoints and evaluations. Only the start of
Python and the download of the data are not in them.
"""

import contextlib
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
from absl import flags

from simclr_jax import config as configs
from simclr_jax import loop, paths, session, train
from simclr_jax.benchmark import recipes, timing
from simclr_jax.config import Config
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest, exit_status, leaving
from simclr_jax.logs import say, write_json
from simclr_jax.table import Table, table_text

RECIPE = "cifar10.py"  # of configs/, where --config names no other

# https://github.com/dkobak/simclr-cifar10, its README, which asks others to be faster.
_RECORD = (
    "Theirs, not run here: 90.3% (10-NN, cosine) after 500 epochs in 99 minutes on one A100, "
    "dkobak/simclr-cifar10"
)
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"

FLAGS = flags.FlagValues()
recipes.define(FLAGS)
_TARGET = flags.DEFINE_float("target", 90.0, "Per cent.", 0.0, 100.0, flag_values=FLAGS)
_METRIC = flags.DEFINE_enum("metric", "knn", ["knn", "knn1"], "What is to reach it.", flag_values=FLAGS)
_K = flags.DEFINE_integer("k", 10, "Neighbours of knn.", lower_bound=1, flag_values=FLAGS)
_EVERY = flags.DEFINE_integer("every", 10, "Epochs.", lower_bound=1, flag_values=FLAGS)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run.", flag_values=FLAGS)
_OUT = flags.DEFINE_string("out", "", "JSON file for the figures.", flag_values=FLAGS)


class Point(NamedTuple):
    """What one evaluation found."""

    epoch: float
    minutes: float  # from the beginning to the end of this evaluation
    accuracy: float  # in [0, 1]


class Timed(NamedTuple):
    """What a run took to where it ended."""

    points: list[Point]
    minutes: float  # of the last point; where there is none, to the end
    evaluation_minutes: float  # of them, without compiling, with those before the first step
    compile_minutes: float  # of them, with those of evaluation's programs
    data: str  # what is classified, by what


def time_to(settings: Config, workdir: paths.Path, stop: StopRequest, *, name: str, target: float) -> Timed:
    """Pretrains until an evaluation reaches `target`, or to the end.

    Args:
      settings: a checked recipe; `run.evaluate_every_epochs` says when it is evaluated.
      workdir: a new folder.
      stop: is asked to stop by the target, or by whoever runs this.
      name: of the accuracy, as `recipe.knn_accuracies` has it.
      target: in [0, 1].

    Raises:
      UserError: as `session.run`, and where the loss becomes NaN or infinite.
    """
    began = time.perf_counter()
    evaluating = 0.0
    compiling: list[float] = []
    points: list[Point] = []
    data = ""

    def timed(evaluate: Callable[[Any], dict[str, float]]) -> Callable[[Any], dict[str, float]]:
        def run(state: Any) -> dict[str, float]:
            nonlocal evaluating
            start, compiled = time.perf_counter(), sum(compiling)
            found = evaluate(state)
            evaluating += time.perf_counter() - start - (sum(compiling) - compiled)
            return found

        return run

    def open_stage(settings: Config, fresh: bool) -> session.Stage:
        nonlocal data
        stage = train.open_stage(settings, fresh)
        steps_per_epoch = configs.derive(settings, len(stage.images)).steps_per_epoch
        timed_evaluate = timed(stage.evaluate)
        data = f"{stage.result['knn1_data']}, {settings.evaluation.metric} distance"

        def evaluate(state: Any) -> dict[str, float]:
            found = timed_evaluate(state)
            minutes = (time.perf_counter() - began) / 60
            points.append(Point(int(state.step) / steps_per_epoch, minutes, found[name]))
            if _reaches(found[name], target):
                stop.ask()
            return found

        return stage._replace(evaluate=evaluate, before=timed(stage.before))

    with _noting_compilation(compiling):
        try:
            session.run(settings, workdir, stop, "pretrain", open_stage)
        except loop.NotFiniteError as error:
            raise UserError(str(error)) from error
    minutes = points[-1].minutes if points else (time.perf_counter() - began) / 60
    return Timed(points, minutes, evaluating / 60, sum(compiling) / 60, data)


def _reaches(accuracy: float, target: float) -> bool:
    return accuracy >= target - 1e-9  # 0.123 is below 12.3 / 100


@contextlib.contextmanager
def _noting_compilation(seconds: list[float]) -> Iterator[None]:
    """Within it, `seconds` gets those of each program that XLA compiles."""

    def note(event: str, duration_secs: float, **about: Any) -> None:
        if event == _COMPILE_EVENT:
            seconds.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


@contextlib.contextmanager
def _no_kept_images(folder: pathlib.Path) -> Iterator[None]:
    """Within it the package's cache is `folder`."""
    name = "SIMCLR_JAX_CACHE"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def table(found: Timed, name: str) -> Table:
    """A row an evaluation."""
    rows = [[f"{epoch:g}", f"{minutes:.2f}", f"{accuracy:.2%}"] for epoch, minutes, accuracy in found.points]
    return Table(f"On {found.data}", ("epoch", "minutes", session.title(name)), rows)


def verdict(found: Timed, target: float) -> str:
    """One line: whether the last evaluation reached `target`, in [0, 1], and after how long."""
    parts = f"of which {found.evaluation_minutes:.2f} evaluating and {found.compile_minutes:.2f} compiling"
    if not found.points:
        return f"stopped before the first evaluation, after {found.minutes:.2f} minutes, {parts}"
    epoch, minutes, accuracy = found.points[-1]
    reached = "reached" if _reaches(accuracy, target) else "not reached"
    return (
        f"{target:.1%} {reached}: {accuracy:.2%} at the last evaluation, after {epoch:g} epochs and "
        f"{minutes:.2f} minutes, {parts}"
    )


def main() -> int:
    """Runs the command line; returns the exit status."""
    out, settings = timing.checked_out(_OUT.value), recipes.read(FLAGS)
    settings.run.evaluate_every_epochs = _EVERY.value
    if _METRIC.value == "knn":
        settings.evaluation.k = _K.value
    name = f"knn{settings.evaluation.k if _METRIC.value == 'knn' else 1}_accuracy"
    target = _TARGET.value / 100
    load = round(os.getloadavg()[0], 2)
    figures = timing.circumstances() | {"load_before": load, "config": settings.to_dict()}
    stop = StopRequest()
    with contextlib.ExitStack() as stack:
        aside = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        workdir = paths.parse(_WORKDIR.value) if _WORKDIR.value else aside / "run"
        if workdir.exists() and (not workdir.is_dir() or paths.entries(workdir)):
            raise UserError(f"--workdir {workdir} is there already; name a new folder, as all is timed anew")
        for line in timing.where(figures["hardware"], load):
            say(line)
        stack.enter_context(timing.no_kept_compilations())
        stack.enter_context(_no_kept_images(aside / "cache"))
        stack.enter_context(leaving("stopped before the first step"))
        found = time_to(settings, workdir, stop, name=name, target=target)
    say("")
    if found.points:
        say(table_text(table(found, name)))
        say("")
    say(verdict(found, target))
    if {settings.data.dataset, settings.evaluation.dataset} == {"cifar10"}:
        say(_RECORD)
    reached = bool(found.points) and _reaches(found.points[-1].accuracy, target)
    figures |= {"metric": name, "target": target, "reached": reached, **found._asdict()}
    figures["points"] = [point._asdict() for point in found.points]
    if out is not None:
        write_json(out, figures)
    return 0 if reached else exit_status(stop.signal)
