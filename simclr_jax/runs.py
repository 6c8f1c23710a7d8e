"""Runs, opened to be used."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from simclr_jax import checkpoints, config, evaluation, paths, recipe, training, workdirs
from simclr_jax.classifier import Classifier
from simclr_jax.config import Config
from simclr_jax.data import sources
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.logs import read_metrics


class Run(NamedTuple):
    """A run of any stage with its kept checkpoints."""

    workdir: paths.Path
    settings: Config
    steps: list[int]  # ascending, at least one
    history: list[dict[str, Any]]  # metrics.jsonl

    @property
    def name(self) -> str:
        """What tables call it."""
        return str(self.workdir)

    @property
    def start(self) -> list[Any]:
        """What decides the initial weights and what the encoder sees of a clean image."""
        settings = self.settings
        seen = [recipe.view_size(settings), settings.views.mean, settings.views.std]
        return [settings.seed, settings.model.to_dict(), seen]

    def weights(self, step: int, like: tuple[Any, Any]) -> tuple[Any, Any]:
        """Parameters and running statistics of a checkpoint, of the modules in `like`.

        Raises `UserError` where they cannot be read, or differ.
        """
        return checkpoints.load_weights(self.workdir / "checkpoints", step, *like)

    def epoch(self, step: int) -> float | None:
        """The epoch of a step, where the log tells how many steps one has."""
        logged = next((record for record in self.history if record["step"] and record["epoch"]), None)
        return round(step * logged["epoch"] / logged["step"], 2) if logged else None


def open_run(workdir: paths.Path) -> Run:
    """Opens a run, finished or not. Raises `UserError` where there is none, or nothing to load of it."""
    settings = workdirs.read_config(workdir)
    steps = checkpoints.finished_steps(workdir / "checkpoints")
    if not steps:
        raise UserError(
            f"{workdir} has no finished checkpoint yet; start its training again, or wait for the first"
        )
    return Run(workdir, settings, steps, read_metrics(workdir / "metrics.jsonl"))


class TrainedClassifier(NamedTuple):
    """A run that ended with a classifier."""

    run: Run
    model: Classifier  # with its initial weights
    labels: dict[str, Any]  # labels.json

    def weights(self, step: int) -> tuple[Any, Any]:
        """Parameters and running statistics of a checkpoint."""
        return self.run.weights(step, training.weights(self.model))


def open_classifier(run: Run) -> TrainedClassifier:
    """Opens the classifier of a run. Raises `UserError` where it has none."""
    labels = workdirs.read_labels(run.workdir)
    if run.settings.stage == "pretrain" or labels is None:
        raise UserError(
            f"{run.name} is a pretrained run, without a classifier; fine-tune it first: "
            "python -m simclr_jax.finetune"
        )
    model = recipe.build_model(run.settings)
    return TrainedClassifier(
        run, recipe.build_classifier(run.settings, model, len(labels["classes"])), labels
    )


def set_evaluation(
    runs: Sequence[Run],
    *,
    dataset: str | None = None,
    folder: str | None = None,
    view_size: int | None = None,
    data_dir: str | None = None,
    **changes: Any,
) -> None:
    """Gives all runs one data set: `dataset` or `folder`, or else that of the first run.

    Args:
      runs: their settings are changed.
      dataset: TFDS name. Its test split is classified, or its validation split if it has no other.
      folder: with one subfolder a class.
      view_size: pixels the encoder sees; None: what each run says.
      data_dir: TFDS folder; None: what each run says.
      **changes: other keys of `config.evaluation`, None for no change.

    Raises:
      UserError: for values that do not fit each other or the data set.
    """
    if dataset and folder:
        raise UserError("set either --dataset or --folder")
    first = runs[0].settings
    data_dir = data_dir or first.run.data_dir
    chosen = first.evaluation
    seen = view_size or recipe.view_size(first)
    if folder:
        chosen.update(dataset="", folder=folder, bank_split="train", query_split="test", canvas_size=seen)
    elif dataset and dataset != chosen.dataset:
        described = sources.describe_tfds(dataset, data_dir=data_dir or None)
        held_out = [split for split in ("test", "validation") if split in described.splits]
        named = changes.get("bank_split") and changes.get("query_split")
        if not named and ("train" not in described.splits or not held_out):
            raise UserError(
                f"{dataset} has the splits {', '.join(described.splits)}; set --bank_split and --query_split"
            )
        chosen.update(
            dataset=dataset,
            folder="",
            bank_split="train",
            query_split=next(iter(held_out), ""),
            canvas_size=described.side or seen,
        )
    chosen.update({key: value for key, value in changes.items() if value is not None}, k=1)
    for run in runs:
        size = view_size or recipe.view_size(run.settings)
        run.settings.evaluation.update(chosen)
        run.settings.evaluation.view_size = size
        run.settings.run.data_dir = data_dir
        config.check(run.settings)


class Encoder:
    """The representations that a run gives images, by any of its weights."""

    def __init__(self, run: Run, images: EvaluationSet, names: Sequence[str]):
        """Of `names` from `SimCLR.representations`; nothing is loaded yet."""
        self._run, self._images = run, images
        self._size = recipe.view_size(run.settings)
        model = recipe.build_model(run.settings)
        self._initial = training.weights(model)
        self._represent = recipe.build_inference(
            model,
            lambda model, images: {
                name: value for name, value in model.representations(images).items() if name in names
            },
        )

    def embed(self, step: int | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """By name float32 [N, F] of bank and of queries; by the weights of a step, or the initial ones."""
        embed = self._embedding(step)
        views = recipe.clean_views(self._run.settings, self._size)
        return embed(self._images.bank, views), embed(self._images.queries, views)

    def augmented(self, step: int | None, name: str, views: int, seed: int) -> np.ndarray:
        """float32 [views * N, F] of random crops and flips of the bank."""
        embed = self._embedding(step)
        make = partial(recipe.crop_and_flip_views, self._run.settings, self._size, seed=seed)
        parts = [embed(self._images.bank, make(number=number))[name] for number in range(views)]
        return np.concatenate(parts)

    def _embedding(self, step: int | None) -> Callable[[Pack, evaluation.MakeViews], dict[str, np.ndarray]]:
        weights = self._initial
        if step is not None:
            weights = self._run.weights(step, weights)
        batch_size = self._run.settings.evaluation.batch_size
        return partial(evaluation.embed, self._represent(*weights), batch_size=batch_size)
