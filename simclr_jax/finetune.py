"""Trains a classifier on labels: from a pretrained encoder, or from scratch as the supervised baseline.

    python -m simclr_jax.finetune --config configs/shapes_finetune.py [--workdir DIR] [--config.KEY=VALUE ...]

    --config.start.run=RUN           the pretrained run to begin with; empty: from scratch
    --config.start.weights=FILE      or an encoder's weights under torchvision's names, as safetensors
    --config.labels.fraction=0.01    share of each class's labels
    --config.labels.per_class=N      or as many of each class

The labels that were drawn are listed in labels.json of the run's folder, --workdir (default:
runs/<config name>). Started again, the same command goes on where the run stopped. simclr_jax/config.py lists
all keys; Chen et al. 2020, https://arxiv.org/abs/2006.10029, is what the recipes follow.
"""

import functools
import sys
from typing import Any

from simclr_jax import command, launch, paths, session, start, supervised
from simclr_jax.config import Config
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import say

_FLAGS = launch.define_flags()


def finetune(
    settings: Config,
    workdir: paths.Path,
    stop: StopRequest,
    *,
    dry_run: bool = False,
    profile: bool = False,
) -> dict[str, Any] | None:
    """Trains on labels as `settings` say, in `workdir`; arguments, result and errors as of `session.run`."""
    return session.run(settings, workdir, stop, "finetune", _open, dry_run=dry_run, profile=profile)


def _open(settings: Config, fresh: bool) -> session.Stage:
    images, labels = supervised.open_labelled(settings)
    queries = supervised.open_queries(settings, labels["classes"], images.name)
    model = supervised.build_classifier(settings, len(images.class_names), fresh=fresh)
    if fresh and settings.classifier.start == "probe":
        start.start_at_probe(settings, model, images)
    evaluate = supervised.build_evaluate(settings, model, queries)

    def before(state: Any) -> dict[str, float]:
        accuracy = evaluate(state)["top1_accuracy"]
        say(f"before the first step: top-1 accuracy {accuracy:.1%} on {queries.name}")
        return {"top1_accuracy_before": accuracy}

    about = {"labels": labels["count"], "accuracy_data": f"{queries.name} ({len(queries):,} images)"}
    return session.Stage(images, model, evaluate, before, about, labels=labels)


if __name__ == "__main__":
    main = functools.partial(launch.main, _FLAGS, finetune, launch.classifier_report)
    sys.exit(command.run(main, sys.argv, usage=f"{__doc__}{launch.USAGE}", flag_values=_FLAGS))
