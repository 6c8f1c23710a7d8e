"""Runs of all stages as rows of one table: by their classifier, or for lack of one by a linear probe."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
from flax import nnx

from simclr_jax import measure, recipe, report, supervised, training, workdirs
from simclr_jax.classifier import Classifier
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.logs import say
from simclr_jax.runs import Run, open_classifier


def classify(runs: Sequence[Run], images: EvaluationSet) -> list[report.ClassifierRow]:
    """What the last checkpoints of fine-tuned and distilled runs reach on the queries of `images`.

    Raises `UserError` for a run that knows other classes.
    """
    rows: list[report.ClassifierRow] = []
    for run in runs:
        trained = open_classifier(run)
        supervised.check_classes(images.queries, trained.labels["classes"], run.name)
        infer = recipe.build_inference(trained.model, Classifier.__call__)
        found = supervised.classify(run.settings, infer(*trained.weights(run.steps[-1])), images.queries)
        rows.append(
            _classifier_row(
                run,
                labels=trained.labels["count"],
                parameters=_size(trained.model),
                top1=found.top1,
                top5=found.top5,
                confusion=measure.confusion(
                    images.queries.label, found.predicted, len(images.queries.class_names)
                ),
                queries=len(images.queries),
            )
        )
        say(f"  {run.name}: top-1 {found.top1:.1%}")
    return rows


def probed(
    runs: Sequence[Run], images: EvaluationSet, rows: Sequence[Mapping[str, Any]]
) -> list[report.ClassifierRow]:
    """The linear probes of pretrained runs as classifiers, from the rows that `evaluate.evaluate` made."""
    found = []
    for run in runs:
        row = next(row for row in rows if row["run"] == run.name and row["last"] and row["step"])
        model = nnx.eval_shape(partial(recipe.build_model, run.settings))
        classifier = (row["width"] + 1) * len(images.bank.class_names)
        found.append(
            _classifier_row(
                run,
                labels=len(images.bank),
                parameters=_size(model.encoder) + classifier,
                top1=row["linear"]["accuracy"],
                top5=row["linear"]["top5"],
                confusion=row["linear"]["confusion"],
                queries=len(images.queries),
            )
        )
    return found


def _classifier_row(
    run: Run,
    *,
    labels: int,
    parameters: int,
    top1: float,
    top5: float | None,
    confusion: list[list[int]] | None,
    queries: int,
) -> report.ClassifierRow:
    start = run.settings.start
    return {
        "name": run.name,
        "run": run.name,
        "kind": run.settings.stage,
        "start": start.run or start.weights,
        "labels": labels,
        "parameters": parameters,
        "images_per_second": (workdirs.read_result(run.workdir) or {}).get("images_per_second"),
        "top1": top1,
        "top5": top5,
        "standard_error": measure.standard_error(top1, queries),
        "confusion": confusion,
    }


def _size(model: nnx.Module) -> int:
    # optax.tree.size takes arrays only, and `probed` has no more than their shapes.
    return sum(leaf.size for leaf in jax.tree.leaves(training.weights(model)[0]))
