"""Trains a student to give the classes that a fine-tuned teacher gives, on images without labels.

    python -m simclr_jax.distill --config configs/shapes_distill.py [--workdir DIR] [--config.KEY=VALUE ...]

    --config.distill.teacher=RUN       a fine-tuned or distilled run
    --config.distill.temperature=1     divides the logits of both
    --config.distill.alpha=1           weight of the teacher; below 1 its labels have the rest

The student is the encoder of the config: as the teacher's (self-distillation), or a smaller one. The run
lives in --workdir (default: runs/<config name>). Started again, the same command goes on where the run
stopped.

Source: Chen et al. 2020, https://arxiv.org/abs/2006.10029, section 2.
"""

import dataclasses
import functools
import sys
from typing import Any

import numpy as np
from flax import nnx

from simclr_jax import command, launch, paths, recipe, runs, session, supervised, training, workdirs
from simclr_jax.classifier import Classifier
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import say

_FLAGS = launch.define_flags()


def distill(
    settings: Config,
    workdir: paths.Path,
    stop: StopRequest,
    *,
    dry_run: bool = False,
    profile: bool = False,
) -> dict[str, Any] | None:
    """Distils as `settings` say, in `workdir`; arguments, result and errors as of `session.run`."""
    return session.run(settings, workdir, stop, "distill", _open, dry_run=dry_run, profile=profile)


def _open(settings: Config, fresh: bool) -> session.Stage:
    name = settings.distill.teacher
    teacher = runs.open_classifier(runs.open_run(paths.parse(name)))
    if workdirs.read_result(teacher.run.workdir) is None:
        raise UserError(f"the teacher {name} is not finished; run its command again before it teaches")
    for key in ("mean", "std"):
        theirs = teacher.run.settings.views[key]
        if tuple(theirs) != tuple(settings.views[key]):
            raise UserError(
                f"the teacher {name} learned with config.views.{key}={tuple(theirs)}; set the same for the "
                "student, as both see the same views"
            )
    queries = supervised.open_queries(settings, teacher.labels["classes"], f"the teacher {name}")
    images = _images(settings, teacher)
    model = supervised.build_classifier(settings, len(queries.class_names), fresh=fresh)
    evaluate = supervised.build_evaluate(settings, model, queries)
    weights = teacher.weights(teacher.run.steps[-1])

    def before(state: Any) -> dict[str, float]:
        infer = recipe.build_inference(teacher.model, Classifier.__call__)(*weights)
        accuracy = supervised.classify(settings, infer, queries).top1
        say(f"teacher: top-1 accuracy {accuracy:.1%} on {queries.name}")
        return {"top1_accuracy_teacher": accuracy}

    about = {"labels": teacher.labels["count"], "accuracy_data": f"{queries.name} ({len(queries):,} images)"}
    graphdef = nnx.graphdef(training.with_batch_statistics(teacher.model, running=True))
    return session.Stage(
        images, model, evaluate, before, about, teacher=(graphdef, weights), labels=teacher.labels
    )


def _images(settings: Config, teacher: runs.TrainedClassifier) -> Pack:
    """The images to train on, with no labels but those that the teacher learned from, where they are used."""
    images = recipe.open_data(settings)
    label = np.full_like(images.label, -1)
    if settings.distill.alpha < 1:
        # Not the images of the teacher's own config: a distilled teacher may have learned from others.
        if images.name != teacher.labels["data"]:
            raise UserError(
                "config.distill.alpha is below 1, which uses the labels that the teacher learned from, of "
                f"{teacher.labels['data']}: set config.data to that instead of {images.name}, or alpha to 1"
            )
        rows = np.asarray(teacher.labels["rows"])
        label[rows] = images.label[rows]
    return dataclasses.replace(images, label=label)


if __name__ == "__main__":
    main = functools.partial(launch.main, _FLAGS, distill, launch.classifier_report)
    sys.exit(command.run(main, sys.argv, usage=f"{__doc__}{launch.USAGE}", flag_values=_FLAGS))
