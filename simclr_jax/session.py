"""A run in its folder, of any stage: from the first step or the last checkpoint to its result."""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from simclr_jax import (
    checkpoints,
    config,
    hosts,
    loop,
    paths,
    profiling,
    recipe,
    rehearsal,
    sheet,
    training,
    workdirs,
)
from simclr_jax import mesh as meshes
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.config import Config
from simclr_jax.data.batches import ResidentBatches, StreamedBatches
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import RunLog, SilentLog, say, versions

_SHARING_TRIES = 10  # one a second: over NFS another host's new files can take a few
_IMAGES_SHOWN = 8  # images of the first batch whose views TensorBoard shows


class Stage(NamedTuple):
    """What a stage of the method brings to a run."""

    images: Pack  # to train on
    model: nnx.Module  # with the weights it begins with
    evaluate: Callable[[training.TrainState], dict[str, float]]  # accuracies by name
    before: Callable[[training.TrainState], dict[str, float]]  # what else is told of the first state
    result: Mapping[str, Any]  # what else `result.json` says
    teacher: Any = None  # (graph definition, weights) of what the student learns from
    labels: dict[str, Any] | None = None  # what `labels.json` says of the labels learned from


class Opened(NamedTuple):
    """A run with all that is known before its first step."""

    settings: Config
    stage: Stage
    mesh: Mesh
    plan: config.Plan
    start: recipe.Start


def run(
    settings: Config,
    workdir: paths.Path,
    stop: StopRequest,
    stage: str,
    open_stage: Callable[..., Stage],
    *,
    dry_run: bool = False,
    profile: bool = False,
) -> dict[str, Any] | None:
    """Trains as `settings` say, in `workdir`.

    Several processes joined by `hosts.join` call it alike and train together; the first writes and prints.

    Args:
      settings: the config.
      workdir: a new or empty folder, or one with an earlier part of the same run; of several processes the
        same one.
      stop: entered around the training; once it is set, the state is saved and training ends.
      stage: the one whose recipe `settings` have to be.
      open_stage: of (settings, fresh) to the stage; `fresh` where there is no checkpoint to go on from.
      dry_run: compile the step, print what it is made of and takes, and write nothing.
      profile: leave a trace of some calls, of the first process, in `workdir`; see `profiling.Trace`.

    Returns:
      What `result.json` holds, or None where the run was stopped before its end, or was a dry one.

    Raises:
      UserError: for what the user can put right. Config, data and the weights to begin with are checked
        before the first byte is written to `workdir`.
      NotFiniteError: if the loss becomes NaN or infinite.
    """
    if dry_run:
        config.check(settings, stage=stage)
        _rehearse(_open(settings, open_stage, fresh=True))
        return None
    with hosts.together():
        config.check(settings, stage=stage)
        workdirs.check(workdir, settings)
        finished = workdirs.read_result(workdir)
    if not hosts.same(settings.to_json()):
        raise UserError("the processes of this run have different configs; start all by the same command")
    _check_shared(workdir)
    if finished is not None:
        say(f"{workdir} holds this run, finished; for another one set --workdir")
        return finished
    fresh = not checkpoints.finished_steps(workdir / "checkpoints")
    opened = _open(settings, open_stage, fresh=fresh)
    with hosts.together():
        if hosts.is_first():
            workdirs.create(workdir, settings, opened.stage.labels)
    _check_shared(workdir)
    result = _train(opened, workdir, stop, profile=profile)
    if result is not None and hosts.is_first():
        workdirs.write_result(workdir, result)
    return result


def _open(settings: Config, open_stage: Callable[..., Stage], *, fresh: bool) -> Opened:
    with hosts.together():
        mesh = meshes.data_mesh(settings.train.batch_size, recipe.microbatches(settings))
        stage = open_stage(settings, fresh)
        images = stage.images
        plan = config.derive(settings, len(images))
        start = recipe.build_start(settings, plan, stage.model, mesh)
    if not hosts.same(str(len(images))):
        raise UserError(f"{images.name} has other images on other hosts; bring all to the same")
    parameters = optax.tree.size(start.state.params)
    say(f"{len(images):,} images of {images.name}; {parameters:,} parameters; {meshes.device_name()}")
    say(str(plan))
    return Opened(settings, stage, mesh, plan, start)


def _train(opened: Opened, workdir: paths.Path, stop: StopRequest, *, profile: bool) -> dict[str, Any] | None:
    settings, stage, plan = opened.settings, opened.stage, opened.plan
    images, state = stage.images, opened.start.state
    with contextlib.ExitStack() as stack:
        saved = Checkpoints(
            workdir / "checkpoints",
            keep=settings.run.keep_checkpoints,
            best_metric=settings.run.best_metric
            or ("knn1_accuracy" if settings.stage == "pretrain" else "top1_accuracy"),
        )
        stack.callback(saved.close)
        restored, seconds, unlogged = saved.restore(state) or (None, 0.0, {})
        first_step = 0 if restored is None else int(restored.step)
        log = (
            RunLog(
                workdir,
                step=first_step,
                total_steps=plan.total_steps,
                steps_per_epoch=plan.steps_per_epoch,
            )
            if hosts.is_first()
            else SilentLog(workdir, step=first_step)
        )
        stack.callback(log.close)
        evaluated: dict[int, dict[str, float]] = {}

        def evaluate(state: training.TrainState) -> dict[str, float]:
            step = int(state.step)
            found = evaluated[step] = stage.evaluate(hosts.local(state))
            log.metrics(step, found)
            say(f"step {step}: {', '.join(f'{title(name)} {value:.1%}' for name, value in found.items())}")
            return found

        if not log.records:
            ids = recipe.first_images(settings, images, _IMAGES_SHOWN)
            views = recipe.first_views(settings, images, ids, count=settings.views.count)
            log.image("views", sheet.view_grid(views))
            log.metrics(0, {"images": len(images), **stage.before(hosts.local(state))})
        before = log.records[0]
        if before["images"] != len(images):
            raise UserError(
                f"{images.name} has {len(images)} images and had {before['images']} when this run began; "
                "bring them back or set another --workdir"
            )
        if restored is not None:
            state = restored
            say(f"going on from step {first_step} of {plan.total_steps}")

        batches, run_steps, key = _program(opened, first_step)
        meter = loop.Meter(settings.train.batch_size, step=first_step, seconds=seconds, unlogged=unlogged)
        around_call = contextlib.nullcontext
        if profile and hosts.is_first():
            trace = profiling.Trace(workdir, wait=meter.sync, resume=meter.resume)
            around_call = stack.enter_context(trace).call
        with stop, _memory_explained(opened, batches.device_bytes):
            state = loop.fit(
                state,
                total_steps=plan.total_steps,
                batches=batches,
                run_steps=functools.partial(run_steps, key),
                evaluate=evaluate,
                evaluate_every_steps=settings.run.evaluate_every_epochs * plan.steps_per_epoch,
                log_every_steps=settings.run.log_every_steps,
                checkpoint_seconds=60 * settings.run.checkpoint_minutes,
                meter=meter,
                log=log,
                checkpoints=saved,
                stop=stop,
                agree=hosts.agree,
                around_call=around_call,
            )
        if int(state.step) < plan.total_steps:
            say(f"stopped at step {int(state.step)} of {plan.total_steps}, which is saved")
            return None
        return {
            "stage": settings.stage,
            "steps": plan.total_steps,
            "epochs": plan.total_steps / plan.steps_per_epoch,
            "seconds": round(meter.seconds, 1),
            "images_per_second": meter.images_per_second,
            "device": meshes.device_name(),
            # A run that was killed between its last checkpoint and its result has only this left to do.
            **(evaluated.get(plan.total_steps) or evaluate(state)),
            **{name: value for name, value in before.items() if name not in ("step", "epoch")},
            **stage.result,
            "parameters": optax.tree.size(state.params),
            "versions": versions(),
        }


def _program(
    opened: Opened, first_step: int
) -> tuple[ResidentBatches | StreamedBatches, jax.stages.Wrapped, Any]:
    """Where the images come from, the compiled steps, and the key that they take."""
    settings, stage, mesh, plan, start = opened
    try:
        batches = recipe.build_batches(settings, stage.images, plan, mesh, first_step=first_step)
    except jax.errors.JaxRuntimeError as error:
        if not rehearsal.is_out_of_memory(error):
            raise
        raise UserError(
            f"{stage.images.name} takes {stage.images.canvas.nbytes / 1e9:.2g} GB, for which the device has "
            "no room; set --config.run.memory_gb lower, and it is streamed"
        ) from error
    step = recipe.build_step(settings, start, mesh, teacher=stage.teacher and stage.teacher[0])
    run_steps = training.make_run_steps(step, batches.fetch, meshes.replicated(mesh))
    key: Any = jax.random.key(settings.seed)
    if stage.teacher is not None:
        key = key, stage.teacher[1]
    return batches, run_steps, hosts.put(key, meshes.replicated(mesh))


def _rehearse(opened: Opened) -> None:
    batches, run_steps, key = _program(opened, 0)
    arrays, indices = batches.call(0, 1)
    say("compiling")
    with _memory_explained(opened, batches.device_bytes):
        program = run_steps.lower(key, opened.start.state, arrays, indices, 1).compile()
    say(rehearsal.describe(opened.settings, opened.start, opened.mesh, program))


@contextlib.contextmanager
def _memory_explained(opened: Opened, data_bytes: int) -> Iterator[None]:
    """Turns a device's lack of memory into a `UserError` that names what to change."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not rehearsal.is_out_of_memory(error):
            raise
        raise UserError(
            rehearsal.out_of_memory(opened.settings, opened.start, opened.mesh, data_bytes=data_bytes)
        ) from error


def _check_shared(workdir: paths.Path) -> None:
    """Raises `UserError` unless all processes see the same files of the run."""
    for _ in range(_SHARING_TRIES):
        files = sorted(path.name for path in (*workdir.glob("*"), *workdir.glob("checkpoints/*")))
        if hosts.same(str(files)):
            return
        time.sleep(1)
    raise UserError(f"--workdir {workdir} is not one folder for all processes; name one that all hosts share")


def title(name: str) -> str:
    """`knn20_accuracy` as "20-NN accuracy", `top1_accuracy` as "top-1 accuracy"."""
    return re.sub(r"^top(\d+)_", r"top-\1 ", re.sub(r"^knn(\d+)_", r"\1-NN ", name))
