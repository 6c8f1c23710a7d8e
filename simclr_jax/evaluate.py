"""Tells what the embeddings of pretrained runs are worth: one table, as text, JSON, pictures and a page.

    python -m simclr_jax.evaluate --workdir RUN [--workdir RUN ...] [--dataset NAME] [--FLAG=VALUE ...]

    --dataset=NAME         labelled TFDS data set; default: the run's config.evaluation.dataset
    --folder=PATH          or a folder with one subfolder a class
    --bank_split=train     learned from; --query_split=test (or validation): classified
    --canvas_size=N        pixels the set is packed at; raw pixels are compared at this size
    --view_size=N          pixels the encoder sees; default: those of training
    --crop=1               side of the central square, as a share of an image's shorter side
    --ks=1,10,20,200       neighbours
    --temperatures=0.07,0.1,0.5  of votes weighted by exp(cosine / temperature)
    --seeds=3              of the linear probe
    --augmented=V          fit it on V random crops and flips of each image instead; default 0
    --labels=10,20,50,100,200,500  labels a class of the few-label curve; empty: none
    --draws=5              random subsets of each size
    --stages               h after each stage of the encoder as well
    --every                each kept checkpoint, not only the last
    --nopictures           tables only
    --points=2000          images in the pictures of the plane and in TensorBoard's projector
    --data_dir=PATH        TFDS folder
    --out=DIR              default: evaluation/<data set> in the first run's folder

Pictures need: pip install -e '.[figures]'
"""

import importlib.metadata
import importlib.util
import pathlib
import re
import sys
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
from absl import flags

from simclr_jax import checkpoints, command, config, evaluation, measure, recipe, report, training, workdirs
from simclr_jax.config import Config
from simclr_jax.data import sources
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.logs import read_metrics, say, write_json
from simclr_jax.mesh import device_name
from simclr_jax.page import Section
from simclr_jax.table import table_text

_KS = (1, 10, 20, 200)
_LABELS = (10, 20, 50, 100, 200, 500)

_FLAGS = flags.FlagValues()
_WORKDIRS = flags.DEFINE_multi_string("workdir", [], "Folder of a run; may repeat.", flag_values=_FLAGS)
_DATASET = flags.DEFINE_string("dataset", None, "Labelled TFDS data set.", flag_values=_FLAGS)
_FOLDER = flags.DEFINE_string("folder", None, "Folder with one subfolder a class.", flag_values=_FLAGS)
_BANK_SPLIT = flags.DEFINE_string("bank_split", None, "Learned from.", flag_values=_FLAGS)
_QUERY_SPLIT = flags.DEFINE_string("query_split", None, "Classified.", flag_values=_FLAGS)
_CANVAS_SIZE = flags.DEFINE_integer("canvas_size", None, "Pixels of the pack.", flag_values=_FLAGS)
_VIEW_SIZE = flags.DEFINE_integer("view_size", None, "Pixels the encoder sees.", flag_values=_FLAGS)
_CROP = flags.DEFINE_float("crop", None, "Central square, share of the shorter side.", flag_values=_FLAGS)
_NEIGHBORS = flags.DEFINE_list("ks", None, "Numbers of neighbours.", flag_values=_FLAGS)
_TEMPERATURES = flags.DEFINE_list("temperatures", ["0.07", "0.1", "0.5"], "Of the votes.", flag_values=_FLAGS)
_SEEDS = flags.DEFINE_integer("seeds", 3, "Of the linear probe.", lower_bound=1, flag_values=_FLAGS)
_AUGMENTED = flags.DEFINE_integer("augmented", 0, "Views of the probe.", lower_bound=0, flag_values=_FLAGS)
_LABELS_FLAG = flags.DEFINE_list("labels", None, "Labels a class.", flag_values=_FLAGS)
_DRAWS = flags.DEFINE_integer("draws", 5, "Subsets of each size.", lower_bound=1, flag_values=_FLAGS)
_STAGES = flags.DEFINE_bool("stages", False, "Each stage of the encoder.", flag_values=_FLAGS)
_EVERY = flags.DEFINE_bool("every", False, "Each kept checkpoint.", flag_values=_FLAGS)
_PICTURES = flags.DEFINE_bool("pictures", True, "Write pictures.", flag_values=_FLAGS)
_POINTS = flags.DEFINE_integer("points", 2000, "Images in the pictures.", lower_bound=4, flag_values=_FLAGS)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder.", flag_values=_FLAGS)
_OUT = flags.DEFINE_string("out", None, "Folder for the results.", flag_values=_FLAGS)


class Run(NamedTuple):
    """A pretrained run with its kept checkpoints."""

    workdir: pathlib.Path
    settings: Config
    steps: list[int]  # ascending, at least one
    history: list[dict[str, Any]]  # metrics.jsonl

    @property
    def name(self) -> str:
        """What tables call it."""
        return str(self.workdir)

    def epoch(self, step: int) -> float | None:
        """The epoch of a step, where the log tells how many steps one has."""
        logged = next((record for record in self.history if record["step"] and record["epoch"]), None)
        return round(step * logged["epoch"] / logged["step"], 2) if logged else None


def open_run(workdir: pathlib.Path) -> Run:
    """Opens a run, finished or not. Raises `UserError` where there is none, or nothing to load of it."""
    settings = workdirs.read_config(workdir)
    steps = checkpoints.finished_steps(workdir / "checkpoints")
    if not steps:
        raise UserError(
            f"{workdir} has no finished checkpoint yet; start its training again, or wait for the first"
        )
    return Run(workdir, settings, steps, read_metrics(workdir / "metrics.jsonl"))


def set_evaluation(runs: Sequence[Run]) -> None:
    """Gives all runs the data set that the flags name, or else that of the first run.

    Raises `UserError` for flags that do not fit each other or the data set.
    """
    if _DATASET.value and _FOLDER.value:
        raise UserError("set either --dataset or --folder")
    chosen = runs[0].settings.evaluation
    if _FOLDER.value:
        chosen.dataset, chosen.folder = "", _FOLDER.value
        chosen.bank_split, chosen.query_split = "train", "test"
        chosen.canvas_size = _VIEW_SIZE.value or recipe.view_size(runs[0].settings)
    elif _DATASET.value and _DATASET.value != chosen.dataset:
        chosen.dataset, chosen.folder = _DATASET.value, ""
        described = sources.describe_tfds(_DATASET.value, data_dir=_data_dir(runs[0].settings))
        held_out = [split for split in ("test", "validation") if split in described.splits]
        if "train" not in described.splits or not held_out:
            if not (_BANK_SPLIT.value and _QUERY_SPLIT.value):
                raise UserError(
                    f"{_DATASET.value} has the splits {', '.join(described.splits)}; "
                    "set --bank_split and --query_split"
                )
        chosen.bank_split, chosen.query_split = "train", (held_out or [""])[0]
        chosen.canvas_size = described.side or _VIEW_SIZE.value or recipe.view_size(runs[0].settings)
    for name, flag in {
        "bank_split": _BANK_SPLIT,
        "query_split": _QUERY_SPLIT,
        "canvas_size": _CANVAS_SIZE,
        "crop": _CROP,
    }.items():
        if flag.value is not None:
            chosen[name] = flag.value
    for run in runs:
        view_size = _VIEW_SIZE.value or recipe.view_size(run.settings)
        run.settings.evaluation.update(chosen)
        run.settings.evaluation.view_size = view_size
        run.settings.run.data_dir = _data_dir(run.settings) or ""
        config.check(run.settings)


def _seen(settings: Config) -> list[Any]:
    """What decides the encoder's view of a clean image."""
    return [recipe.view_size(settings), settings.views.mean, settings.views.std]


def _data_dir(settings: Config) -> str | None:
    return _DATA_DIR.value or settings.run.data_dir or None


def questions(images: EvaluationSet) -> measure.Questions:
    """What the flags ask; by default no more than the images can answer.

    Raises `UserError` for a k beyond the bank, or more labels a class than there are.
    """
    counts = np.bincount(images.bank.label, minlength=len(images.bank.class_names))
    rarest = int(counts.argmin())
    if not counts[rarest]:
        raise UserError(
            f"class {images.bank.class_names[rarest]} has no example in {images.bank.name}; "
            "choose a larger --bank_split"
        )
    ks = _numbers("ks", _NEIGHBORS.value, int) or [k for k in _KS if k <= len(images.bank)]
    if max(ks) > len(images.bank):
        raise UserError(
            f"--ks asks for {max(ks)} neighbours, {images.bank.name} has {len(images.bank):,} images"
        )
    if _LABELS_FLAG.value is None:
        labels = [n for n in _LABELS if n < counts[rarest]]
    else:
        labels = _numbers("labels", _LABELS_FLAG.value, int)
        if labels and max(labels) > counts[rarest]:
            raise UserError(
                f"--labels asks for {max(labels)} a class, {images.bank.name} has {counts[rarest]} of class "
                f"{images.bank.class_names[rarest]}"
            )
        if labels and min(labels) < 2:
            raise UserError("--labels needs 2 a class or more, as some choose the penalty")
    return measure.Questions(
        ks=sorted({1, *ks}),
        temperatures=_numbers("temperatures", _TEMPERATURES.value, float),
        seeds=range(_SEEDS.value),
        per_class=labels,
        draws=_DRAWS.value,
    )


def _numbers(name: str, texts: Sequence[str] | None, kind: type) -> list[Any]:
    """The numbers above 0 that a flag lists, ascending."""
    try:
        values = sorted({kind(text) for text in texts or ()})
    except ValueError:
        values = [0]
    if values and not values[0] > 0:
        raise UserError(f"--{name} is {','.join(texts or ())}; write numbers above 0, such as 1,10")
    return values


class _Encoder:
    """The representations that a run gives images, by any of its weights."""

    def __init__(self, run: Run, images: EvaluationSet, names: Sequence[str]):
        self._run, self._images, self._names = run, images, names
        self._size = recipe.view_size(run.settings)
        model = recipe.build_model(run.settings)
        self._initial = training.weights(model)
        self._represent = recipe.build_representations(model, names)

    def embed(self, step: int | None) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """By name float32 [N, F] of bank and of queries; by the weights of a step, or the initial ones."""
        views = recipe.clean_views(self._run.settings, self._size)
        bank, queries = (self._embed(step, pack, views) for pack in self._images)
        return bank, queries

    def augmented(self, step: int | None, name: str, views: int, seed: int) -> np.ndarray:
        """float32 [views * N, F] of random crops and flips of the bank."""
        make = partial(recipe.crop_and_flip_views, self._run.settings, self._size, seed=seed)
        return np.concatenate(
            [self._embed(step, self._images.bank, make(number=number))[name] for number in range(views)]
        )

    def _embed(self, step: int | None, pack: Pack, views: evaluation.MakeViews) -> dict[str, np.ndarray]:
        encode = self._represent(*self._weights(step))
        return evaluation.embed(encode, pack, views, batch_size=self._run.settings.evaluation.batch_size)

    @lru_cache(maxsize=1)  # noqa: B019
    def _weights(self, step: int | None) -> tuple[Any, Any]:
        if step is None:
            return self._initial
        return checkpoints.load_weights(self._run.workdir / "checkpoints", step, *self._initial)


def evaluate(
    runs: Sequence[Run],
    images: EvaluationSet,
    asked: measure.Questions,
    *,
    stages: bool = False,
    every: bool = False,
    augmented: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Measures runs on `images`: h and z, the untrained encoders, raw pixels.

    Args:
      runs: with the evaluation settings that all share.
      images: what they are measured on.
      asked: what of each representation; of checkpoints before the last no few labels, and one seed.
      stages: h after each stage as well.
      every: each kept checkpoint, not only the last.
      augmented: crops and flips of each image of the bank that the linear probe is fitted on; 0: none.

    Returns:
      A row of the table for each, and by their names the embeddings [N, F] and [Q, F] of the trained h
      and of raw pixels.
    """
    rows: list[dict[str, Any]] = []
    kept: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    briefly = asked._replace(seeds=asked.seeds[:1], per_class=())
    names = ["h", "z", *(f"stage {number}" for number in (1, 2, 3) if stages)]

    def add(name: str, bank: np.ndarray, queries: np.ndarray, asked: measure.Questions, **about: Any) -> None:
        more = about.pop("augmented", None)
        classes = len(images.bank.class_names)
        features = measure.Features(bank, images.bank.label, queries, images.queries.label, classes)
        row = {"name": name, "run": None, "step": None, "epoch": None, "last": True, **about}
        row |= measure.measure(features, asked, augmented=more)
        rows.append(row)
        epoch = "" if row["epoch"] is None else f", epoch {row['epoch']:g}"
        one, linear = row["knn"][0]["accuracy"], row["linear"]["accuracy"]
        say(f"  {name}{epoch}: 1-NN {one:.1%}, linear {linear:.1%}")

    starts: list[Any] = []
    for run in runs:
        encoder = _Encoder(run, images, names)
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        wanted: list[tuple[int | None, list[str], measure.Questions]] = [
            (step, ["h"], briefly) for step in run.steps[:-1] if every
        ]
        wanted.append((run.steps[-1], names, asked))
        start = [run.settings.seed, run.settings.model.to_dict(), _seen(run.settings)]
        if start not in starts:  # runs of one model and seed begin with the same weights
            starts.append(start)
            wanted.append((None, ["h"], asked))
        for step, representations, questions in wanted:
            bank, queries = encoder.embed(step)
            for representation in representations:
                kind = f"untrained {representation}" if step is None else representation
                name = prefix + (kind if step is None else f"trained {representation}")
                add(
                    name,
                    bank[representation],
                    queries[representation],
                    questions,
                    run=run.name,
                    step=step,
                    epoch=None if step is None else run.epoch(step),
                    representation=kind,
                    last=questions is asked,
                    augmented=partial(encoder.augmented, step, representation, augmented)
                    if augmented
                    else None,
                )
            if step == run.steps[-1]:
                kept[f"{prefix}trained h"] = bank["h"], queries["h"]

    settings = runs[0].settings
    views = recipe.clean_views(settings, settings.evaluation.canvas_size)
    bank, queries = (
        evaluation.embed(evaluation.raw_pixels, pack, views, batch_size=settings.evaluation.batch_size)
        for pack in images
    )
    add("raw pixels", bank, queries, asked, representation="raw pixels")
    kept["raw pixels"] = bank, queries
    return rows, kept


def draw(
    out: pathlib.Path,
    results: dict[str, Any],
    images: EvaluationSet,
    kept: dict[str, tuple[np.ndarray, np.ndarray]],
    runs: Sequence[Run],
    *,
    points: int,
) -> list[Section]:
    """Writes the pictures of `results` to `out`, of `points` queries; returns what the page shows of them."""
    drawn = np.random.default_rng(0).permutation(len(images.queries))[:points]

    def image(pack: Pack, row: int) -> np.ndarray:
        height, width = pack.extent[row]
        return pack.canvas[row, :height, :width]

    shown = report.Images(
        [image(images.queries, row) for row in drawn],
        images.queries.label[drawn],
        partial(image, images.bank),
        images.bank.label,
        images.bank.class_names,
    )
    parts = [report.Shown(name, bank, queries[drawn]) for name, (bank, queries) in kept.items()]
    histories = {run.name: run.history for run in runs}
    return report.write_pictures(out, results, parts, shown, histories, seed=0)


def main() -> int:
    """Runs the command line; returns the exit status."""
    if not _WORKDIRS.value:
        raise UserError("name a run with --workdir, such as runs/shapes")
    runs = [open_run(pathlib.Path(folder)) for folder in dict.fromkeys(_WORKDIRS.value)]
    set_evaluation(runs)
    chosen = runs[0].settings.evaluation
    name = chosen.dataset or pathlib.Path(chosen.folder).expanduser().resolve().name
    out = pathlib.Path(_OUT.value or runs[0].workdir / "evaluation" / re.sub(r"[^\w.-]+", "-", name))
    images = recipe.open_evaluation_set(runs[0].settings)
    asked = questions(images)
    out.mkdir(parents=True, exist_ok=True)

    say(f"measuring on {images}")
    rows, kept = evaluate(
        runs, images, asked, stages=_STAGES.value, every=_EVERY.value, augmented=_AUGMENTED.value
    )
    results = {
        "bank": {"name": images.bank.name, "count": len(images.bank)},
        "queries": {"name": images.queries.name, "count": len(images.queries), "dataset": name},
        "settings": {
            "ks": asked.ks,
            "temperatures": asked.temperatures,
            "seeds": list(asked.seeds),
            "labels_per_class": asked.per_class,
            "draws": asked.draws,
            "augmented": _AUGMENTED.value,
            "crop": chosen.crop,
            "canvas_size": chosen.canvas_size,
            "view_size": {run.name: recipe.view_size(run.settings) for run in runs},
        },
        "rows": rows,
        "device": device_name(),
        "versions": {
            package: importlib.metadata.version(package) for package in ("simclr_jax", "jax", "flax", "optax")
        },
    }
    write_json(out / "evaluation.json", results)
    for table in report.tables(results):
        say("\n" + table_text(table))
    sections = []
    if _PICTURES.value and all(map(importlib.util.find_spec, ("matplotlib", "sklearn"))):
        sections = draw(out, results, images, kept, runs, points=_POINTS.value)
    elif _PICTURES.value:
        say("\nno pictures: pip install -e '.[figures]'")
    report.write_page(out / "page.html", results, sections)
    say(f"\nwrote {out / 'evaluation.json'} and {out / 'page.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, usage=__doc__ or "", flag_values=_FLAGS))
