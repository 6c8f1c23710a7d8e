"""Pretrains an encoder with SimCLR and prints what its embeddings are worth.

    python -m simclr_jax.train --config configs/shapes.py [--workdir DIR] [--config.KEY=VALUE ...]

Any key of the config can be set on the command line, for example --config.train.batch_size=128;
simclr_jax/config.py lists them all. The run lives in --workdir (default: runs/<config name>). Started
again, the same command goes on where the run stopped.
"""

import functools
import sys
from typing import Any

from simclr_jax import command, launch, paths, recipe, session, start, training
from simclr_jax.config import Config
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import say
from simclr_jax.simclr import SimCLR

_FLAGS = launch.define_flags()


def train(
    settings: Config,
    workdir: paths.Path,
    stop: StopRequest,
    *,
    dry_run: bool = False,
    profile: bool = False,
) -> dict[str, Any] | None:
    """Pretrains as `settings` say, in `workdir`; arguments, result and errors as of `session.run`."""
    return session.run(settings, workdir, stop, "pretrain", open_stage, dry_run=dry_run, profile=profile)


def open_stage(settings: Config, fresh: bool) -> session.Stage:
    """What pretraining brings to a run; see `session.run`."""
    images = recipe.open_data(settings)
    evaluation_set = recipe.open_evaluation_set(settings)
    model = start.start_model(settings, fresh=fresh)
    encode = recipe.build_inference(model, SimCLR.h)
    about = {
        "start": settings.start.run or settings.start.weights,
        "knn1_metric": settings.evaluation.metric,
        "knn1_data": str(evaluation_set),
    }

    def evaluate(state: training.TrainState) -> dict[str, float]:
        return recipe.knn_accuracies(settings, encode(state.params, state.batch_stats), evaluation_set)

    def before(state: training.TrainState) -> dict[str, float]:
        say(f"1-NN on {evaluation_set}, {settings.evaluation.metric} distance:")
        raw_pixels = recipe.raw_pixel_accuracy(settings, evaluation_set)
        say(f"  raw pixels         {raw_pixels:.1%}")
        untrained = evaluate(state)["knn1_accuracy"]
        say(f"  {_first_encoder(about):<17}  {untrained:.1%}")
        return {"knn1_accuracy_raw_pixels": raw_pixels, "knn1_accuracy_untrained": untrained}

    return session.Stage(images, model, evaluate, before, about)


def _first_encoder(about: dict[str, Any]) -> str:
    return "encoder at start" if about.get("start") else "untrained encoder"


def report(result: dict[str, Any]) -> str:
    """The last lines of a run."""
    return "\n".join(
        [
            launch.pace(result),
            f"1-NN accuracy on {result['knn1_data']}, {result['knn1_metric']} distance:",
            f"  raw pixels         {result['knn1_accuracy_raw_pixels']:6.1%}",
            f"  {_first_encoder(result):<17}  {result['knn1_accuracy_untrained']:6.1%}",
            f"  trained encoder    {result['knn1_accuracy']:6.1%}",
        ]
    )


if __name__ == "__main__":
    main = functools.partial(launch.main, _FLAGS, train, report)
    sys.exit(command.run(main, sys.argv, usage=f"{__doc__}{launch.USAGE}", flag_values=_FLAGS))
