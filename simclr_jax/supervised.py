"""From a checked config to the pieces of a run with labels: images, classifier, accuracy."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from simclr_jax import classification, evaluation, labels, recipe, start
from simclr_jax.classifier import Classifier
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError


def open_labelled(config: Config) -> tuple[Pack, dict[str, Any]]:
    """The images whose labels may be learned, and what `labels.json` says of them.

    Raises `UserError` where the data set has no labels, or too few of a class.
    """
    images = recipe.open_data(config)
    if not images.class_names or (images.label < 0).all():
        raise UserError(f"{images.name} has no labels to learn; choose a labelled data set and split")
    chosen = config.labels
    try:
        rows = labels.draw(
            images.label,
            images.class_names,
            fraction=chosen.fraction,
            per_class=chosen.per_class,
            seed=chosen.seed,
        )
    except ValueError as error:
        raise UserError(
            f"{error} in {images.name}; set config.labels.fraction or config.labels.per_class to fit it"
        ) from error
    record = {
        "classes": list(images.class_names),
        "data": images.name,
        "count": len(rows),
        **chosen.to_dict(),
        "rows": rows.tolist(),
    }
    return images.take(rows), record


def open_queries(config: Config, classes: list[str], owner: str) -> Pack:
    """The labelled images that accuracy is measured on, whose classes have to be those of `owner`."""
    queries = recipe.open_evaluation_split(config, config.evaluation.query_split)
    evaluation.check_labelled(queries)
    check_classes(queries, classes, owner)
    return queries


def check_classes(queries: Pack, classes: list[str], owner: str) -> None:
    """Raises `UserError` unless labelled images have the classes that `owner` knows."""
    if list(queries.class_names) != classes:
        differing = sorted(set(queries.class_names) ^ set(classes))
        named = f", such as {differing[0]}" if differing else ", in another order"
        raise UserError(
            f"{owner} knows {len(classes)} classes and {queries.name} has others{named}; they have to be the "
            "same, in the same order"
        )


def build_classifier(config: Config, classes: int, *, fresh: bool) -> Classifier:
    """The classifier; with `fresh` its encoder begins as `config.start` says, otherwise as drawn."""
    return recipe.build_classifier(config, start.start_model(config, fresh=fresh), classes)


def build_evaluate(config: Config, model: Classifier, queries: Pack) -> Callable[[Any], dict[str, float]]:
    """Of a state to its `top1_accuracy`, and where there are more than five classes `top5_accuracy`."""
    infer = recipe.build_inference(model, Classifier.__call__)

    def evaluate(state: Any) -> dict[str, float]:
        found = classify(config, infer(state.params, state.batch_stats), queries)
        accuracies = {"top1_accuracy": found.top1}
        return accuracies if found.top5 is None else accuracies | {"top5_accuracy": found.top5}

    return evaluate


def classify(config: Config, infer: Callable[[jax.Array], jax.Array], queries: Pack) -> classification.Scores:
    """What a compiled function of images to logits reaches on labelled images, seen as in evaluation."""
    views = recipe.clean_views(config, recipe.view_size(config))
    logits = evaluation.embed(infer, queries, views, batch_size=config.evaluation.batch_size)
    return classification.scores(np.asarray(logits), queries.label, len(queries.class_names))
