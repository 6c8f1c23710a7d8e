"""Tells what runs are worth, pretrained, fine-tuned or distilled: tables as text, JSON, pictures and a page.

    python -m simclr_jax.evaluate --workdir RUN [--workdir RUN ...] [--dataset NAME] [--FLAG=VALUE ...]

    --dataset=NAME         labelled TFDS data set; default: the run's config.evaluation.dataset
    --folder=PATH          or a folder with one subfolder a class
    --bank_split=train     learned from; --query_split=test (or validation): classified
    --canvas_size=N        pixels the set is packed at
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

import importlib.util
import math
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from absl import flags

from simclr_jax import command, comparison, evaluation, measure, paths, recipe, report
from simclr_jax.config import Config
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError
from simclr_jax.evaluation import EvaluationSet
from simclr_jax.logs import say, versions, write_json
from simclr_jax.mesh import device_name
from simclr_jax.page import Section
from simclr_jax.runs import Encoder, Run, open_run, set_evaluation
from simclr_jax.table import table_text

_KS = (1, 10, 20, 200)
_LABELS = (10, 20, 50, 100, 200, 500)
_RAW_SIZE = 32  # pixels, at most: 10,000 images of 224 would be 6 GB of features

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


def questions(
    images: EvaluationSet,
    *,
    ks: Sequence[int] | None,
    temperatures: Sequence[float],
    seeds: int,
    labels: Sequence[int] | None,
    draws: int,
) -> measure.Questions:
    """What is asked of each representation; None: as much of the usual as the images can answer.

    Raises `UserError` for a k beyond the bank, or more labels a class than there are.
    """
    bank = images.bank
    counts = np.bincount(bank.label, minlength=len(bank.class_names))
    rarest = int(counts.argmin())
    if not counts[rarest]:
        raise UserError(
            f"class {bank.class_names[rarest]} has no example in {bank.name}; choose a larger --bank_split"
        )
    if counts[rarest] < 2:
        raise UserError(
            f"class {bank.class_names[rarest]} has one example in {bank.name}, and the linear probe needs "
            "two, as some choose its penalty; choose a larger --bank_split"
        )
    if ks is None:
        ks = [k for k in _KS if k <= len(bank)]
    elif max(ks) > len(bank):
        raise UserError(f"--ks asks for {max(ks)} neighbours, {bank.name} has {len(bank):,} images")
    if labels is None:
        labels = [n for n in _LABELS if n < counts[rarest]]
    elif labels and max(labels) > counts[rarest]:
        raise UserError(
            f"--labels asks for {max(labels)} a class, {bank.name} has {counts[rarest]} of class "
            f"{bank.class_names[rarest]}"
        )
    elif labels and min(labels) < 2:
        raise UserError("--labels needs 2 a class or more, as some choose the penalty")
    return measure.Questions(
        ks=sorted({1, *ks}), temperatures=temperatures, seeds=range(seeds), per_class=labels, draws=draws
    )


def _numbers(flag: flags.FlagHolder, kind: type) -> list[Any] | None:
    """The numbers above 0 that a flag lists, ascending; None where it is not set."""
    if flag.value is None:
        return None
    try:
        values = sorted({kind(text) for text in flag.value})
    except ValueError:
        values = [0]
    if values and not 0 < values[0] <= values[-1] < math.inf:
        raise UserError(f"--{flag.name} is {','.join(flag.value)}; write numbers above 0, such as 1,10")
    return values


def evaluate(
    runs: Sequence[Run],
    images: EvaluationSet,
    asked: measure.Questions,
    *,
    stages: bool = False,
    every: bool = False,
    augmented: int = 0,
) -> tuple[list[dict[str, Any]], dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Measures pretrained runs on `images`: h and z, the untrained encoders, raw pixels.

    Args:
      runs: with the evaluation settings that all share; of none, nothing is measured.
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
    if not runs:
        return rows, kept
    briefly = asked._replace(seeds=asked.seeds[:1], per_class=())
    names = ["h", "z", *(f"stage {number}" for number in (1, 2, 3) if stages)]

    def add(
        name: str,
        bank: np.ndarray,
        queries: np.ndarray,
        asked: measure.Questions,
        augmented: Callable[[int], np.ndarray] | None = None,
        **about: Any,
    ) -> None:
        classes = len(images.bank.class_names)
        features = measure.Features(bank, images.bank.label, queries, images.queries.label, classes)
        row = {"name": name, "run": None, "step": None, "epoch": None, "last": True, **about}
        row |= measure.measure(features, asked, augmented=augmented)
        if row["representation"] != "h":
            del row["linear"]["confusion"]  # of 100 classes 10,000 lines of JSON, which nobody asked for
        rows.append(row)
        epoch = "" if row["epoch"] is None else f", epoch {row['epoch']:g}"
        one, linear = row["knn"][0]["accuracy"], row["linear"]["accuracy"]
        say(f"  {name}{epoch}: 1-NN {one:.1%}, linear {linear:.1%}")

    starts: list[Any] = []
    for run in runs:
        encoder = Encoder(run, images, names)
        prefix = f"{run.name}: " if len(runs) > 1 else ""
        wanted: list[tuple[int | None, list[str], measure.Questions]] = [
            (step, ["h"], briefly) for step in run.steps[:-1] if every
        ]
        wanted.append((run.steps[-1], names, asked))
        if run.start not in starts:  # runs of one model and seed begin with the same weights
            starts.append(run.start)
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
                    augmented=(
                        partial(encoder.augmented, step, representation, augmented) if augmented else None
                    ),
                )
            if step == run.steps[-1]:
                kept[f"{prefix}trained h"] = bank["h"], queries["h"]

    settings = runs[0].settings
    views = recipe.clean_views(settings, raw_size(settings))
    bank, queries = (
        evaluation.embed(evaluation.raw_pixels, pack, views, batch_size=settings.evaluation.batch_size)
        for pack in images
    )
    add("raw pixels", bank, queries, asked, representation="raw pixels")
    kept["raw pixels"] = bank, queries
    return rows, kept


def raw_size(settings: Config) -> int:
    """The pixels at which raw pixels are compared."""
    return min(settings.evaluation.canvas_size, _RAW_SIZE)


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
    # Of one kind, as losses of two have nothing to do with each other.
    histories = {run.name: run.history for run in runs if run.settings.stage == runs[0].settings.stage}
    return report.write_pictures(out, results, parts, shown, histories, seed=0)


def _folder_name(text: str) -> str:
    folder = paths.parse(text)
    return (folder.resolve() if isinstance(folder, pathlib.Path) else folder).name


def main() -> int:
    """Runs the command line; returns the exit status."""
    if not _WORKDIRS.value:
        raise UserError("name a run with --workdir, such as runs/shapes")
    runs = [open_run(paths.parse(folder)) for folder in dict.fromkeys(_WORKDIRS.value)]
    set_evaluation(
        runs,
        dataset=_DATASET.value,
        folder=_FOLDER.value,
        bank_split=_BANK_SPLIT.value,
        query_split=_QUERY_SPLIT.value,
        canvas_size=_CANVAS_SIZE.value,
        view_size=_VIEW_SIZE.value,
        crop=_CROP.value,
        data_dir=_DATA_DIR.value,
    )
    chosen = runs[0].settings.evaluation
    name = re.sub(r"[^\w.-]+", "-", chosen.dataset or _folder_name(chosen.folder))
    out = paths.parse(_OUT.value) if _OUT.value else runs[0].workdir / "evaluation" / name
    images = recipe.open_evaluation_set(runs[0].settings)
    pretrained = [run for run in runs if run.settings.stage == "pretrain"]
    tuned = [run for run in runs if run.settings.stage != "pretrain"]
    asked = questions(
        images,
        ks=_numbers(_NEIGHBORS, int),
        temperatures=_numbers(_TEMPERATURES, float) or [],
        seeds=_SEEDS.value,
        labels=_numbers(_LABELS_FLAG, int),
        draws=_DRAWS.value,
    )
    paths.make_folder(out)

    say(f"measuring on {images}")
    classifiers = comparison.classify(tuned, images)
    rows, kept = evaluate(
        pretrained, images, asked, stages=_STAGES.value, every=_EVERY.value, augmented=_AUGMENTED.value
    )
    classifiers += comparison.probed(pretrained, images, rows)
    order = [run.name for run in runs]
    results = {
        "bank": {"name": images.bank.name, "count": len(images.bank)},
        "queries": {"name": images.queries.name, "count": len(images.queries), "dataset": chosen.dataset},
        "settings": {
            "ks": asked.ks,
            "temperatures": asked.temperatures,
            "seeds": list(asked.seeds),
            "labels_per_class": asked.per_class,
            "draws": asked.draws,
            "augmented": _AUGMENTED.value,
            "crop": chosen.crop,
            "canvas_size": chosen.canvas_size,
            "raw_size": raw_size(runs[0].settings),
            "view_size": {run.name: recipe.view_size(run.settings) for run in runs},
        },
        "classifiers": sorted(classifiers, key=lambda row: order.index(row["run"])),
        "rows": rows,
        "device": device_name(),
        "versions": versions(),
    }
    write_json(out / "evaluation.json", results)
    for table in report.tables(results):
        say("\n" + table_text(table))
    with paths.local(out) as folder:
        folder.mkdir(exist_ok=True)
        sections = []
        if _PICTURES.value and all(map(importlib.util.find_spec, ("matplotlib", "sklearn"))):
            sections = draw(folder, results, images, kept, runs, points=_POINTS.value)
        elif _PICTURES.value:
            say("\nno pictures: pip install -e '.[figures]'")
        report.write_page(folder / "page.html", results, sections)
    say(f"\nwrote {out / 'evaluation.json'} and {out / 'page.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main, sys.argv, usage=__doc__ or "", flag_values=_FLAGS))
