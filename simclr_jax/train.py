"""Pretrains an encoder with SimCLR and prints what its embeddings are worth.

    python -m simclr_jax.train --config configs/shapes.py [--workdir DIR] [--config.KEY=VALUE ...]

Any key of the config can be set on the command line, for example --config.train.batch_size=128;
simclr_jax/config.py lists them all. The run lives in --workdir (default: runs/<config name>). Started
again, the same command goes on where the run stopped.
"""

import contextlib
import functools
import importlib.metadata
import pathlib
import signal
import sys
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from simclr_jax import command, config, loop, recipe, sheet, training, workdirs
from simclr_jax import mesh as meshes
from simclr_jax.checkpoints import Checkpoints
from simclr_jax.config import Config
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import RunLog, say

_FLAGS = flags.FlagValues()
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Recipe of the run.", lock_config=True, flag_values=_FLAGS
)
_IMAGES_SHOWN = 8  # images of the first batch whose views TensorBoard shows
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=_FLAGS)


def train(settings: Config, workdir: pathlib.Path, stop: StopRequest) -> dict[str, Any] | None:
    """Pretrains as `settings` say, in `workdir`.

    Args:
      settings: the config.
      workdir: a new or empty folder, or one with an earlier part of the same run.
      stop: entered around the training; once it is set, the state is saved and training ends.

    Returns:
      What `result.json` holds, or None where the run was stopped before its end.

    Raises:
      UserError: for what the user can put right. Config and data are checked before the first byte is
        written to `workdir`.
      NotFiniteError: if the loss becomes NaN or infinite.
    """
    config.check(settings)
    workdirs.check(workdir, settings)
    finished = workdirs.read_result(workdir)
    if finished is not None:
        say(f"{workdir} holds this run, finished; for another one set --workdir")
        return finished
    mesh = meshes.data_mesh(settings.train.batch_size)
    images = recipe.open_data(settings)
    plan = config.derive(settings, len(images))
    evaluation_set = recipe.open_evaluation_set(settings)

    model = recipe.build_model(settings)
    encode = recipe.build_encode(model)
    schedule = recipe.build_schedule(settings, plan)
    optimizer = recipe.build_optimizer(settings, schedule)
    graphdef, state = training.create_state(model, optimizer)
    state = jax.device_put(state, meshes.replicated(mesh))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    say(f"{len(images):,} images of {images.name}; {parameters:,} parameters; {meshes.device_name()}")
    say(str(plan))

    workdirs.create(workdir, settings)
    with contextlib.ExitStack() as stack:
        saved = Checkpoints(
            workdir / "checkpoints",
            keep=settings.run.keep_checkpoints,
            best_metric=settings.run.best_metric,
        )
        stack.callback(saved.close)
        restored, seconds = saved.restore(state) or (None, 0.0)
        start = 0 if restored is None else int(restored.step)
        log = RunLog(
            workdir,
            step=start,
            total_steps=plan.total_steps,
            steps_per_epoch=plan.steps_per_epoch,
        )
        stack.callback(log.close)

        def knn(state: training.TrainState) -> dict[str, float]:
            embed = encode(state.params, state.batch_stats)
            return recipe.knn_accuracies(settings, embed, evaluation_set)

        def evaluate(state: training.TrainState) -> dict[str, float]:
            found = knn(state)
            log.metrics(int(state.step), found)
            texts = [f"{name[3:].replace('_', '-NN ')} {value:.1%}" for name, value in found.items()]
            say(f"step {int(state.step)}: {', '.join(texts)}")
            return found

        if not log.records:
            ids = recipe.first_images(settings, images, _IMAGES_SHOWN)
            views = recipe.first_views(settings, images, ids, count=settings.views.count)
            log.image("views", sheet.view_grid(views))
            say(f"1-NN on {evaluation_set}, {settings.evaluation.metric} distance:")
            raw_pixels = recipe.raw_pixel_accuracy(settings, evaluation_set)
            say(f"  raw pixels         {raw_pixels:.1%}")
            untrained = knn(state)["knn1_accuracy"]
            say(f"  untrained encoder  {untrained:.1%}")
            log.metrics(
                0,
                {
                    "images": len(images),
                    "knn1_accuracy_raw_pixels": raw_pixels,
                    "knn1_accuracy_untrained": untrained,
                },
            )
        before = log.records[0]
        if before["images"] != len(images):
            raise UserError(
                f"{images.name} has {len(images)} images and had {before['images']} when this run began; "
                "bring them back or set another --workdir"
            )
        if restored is not None:
            state = restored
            say(f"going on from step {start} of {plan.total_steps}")

        batches = recipe.build_batches(settings, images, plan, mesh, first_step=start)
        run_steps = training.make_run_steps(
            recipe.build_step(settings, graphdef, optimizer, schedule, mesh),
            batches.fetch,
            meshes.replicated(mesh),
        )
        key = jax.random.key(settings.seed)
        meter = loop.Meter(settings.train.batch_size, step=start, seconds=seconds)
        with stop:
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
            )
        if int(state.step) < plan.total_steps:
            say(
                f"stopped at step {int(state.step)} of {plan.total_steps}, which is saved; "
                "the same command goes on from there"
            )
            return None
        # A run that was killed between its last checkpoint and its result has only this left to do.
        known = {name: value for name, value in meter.latest.items() if name.startswith("knn")}
        accuracies = known or evaluate(state)
        result = {
            "steps": plan.total_steps,
            "epochs": plan.total_steps / plan.steps_per_epoch,
            "seconds": round(meter.seconds, 1),
            "images_per_second": meter.images_per_second,
            "device": meshes.device_name(),
            **accuracies,
            "knn1_accuracy_raw_pixels": before["knn1_accuracy_raw_pixels"],
            "knn1_accuracy_untrained": before["knn1_accuracy_untrained"],
            "knn1_metric": settings.evaluation.metric,
            "knn1_data": str(evaluation_set),
            "images": len(images),
            "parameters": parameters,
            "versions": {
                name: importlib.metadata.version(name) for name in ("simclr_jax", "jax", "flax", "optax")
            },
        }
        workdirs.write_result(workdir, result)
    return result


def report(result: dict[str, Any]) -> str:
    """The last lines of a run."""
    speed = result["images_per_second"]
    return "\n".join(
        [
            f"{result['steps']} steps in {result['seconds']:.0f} s on {result['device']}"
            + (f", {speed:,.0f} images/s" if speed else ""),
            f"1-NN accuracy on {result['knn1_data']}, {result['knn1_metric']} distance:",
            f"  raw pixels         {result['knn1_accuracy_raw_pixels']:6.1%}",
            f"  untrained encoder  {result['knn1_accuracy_untrained']:6.1%}",
            f"  trained encoder    {result['knn1_accuracy']:6.1%}",
        ]
    )


def main() -> int:
    """Runs the command line; returns the exit status."""
    file = command.config_file(_FLAGS)
    workdir = pathlib.Path(_WORKDIR.value or pathlib.Path("runs", file.stem))
    stop = StopRequest()
    try:
        result = train(_CONFIG.value, workdir, stop)
    except loop.NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result is None:
        return 130 if stop.signal == signal.SIGINT else 0
    print(report(result))
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, usage=__doc__ or "", flag_values=_FLAGS))
