"""Logistic regression on embeddings, beside PyTorch's: seconds a fit, and what the fit reaches."""

import contextlib
import functools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from simclr_jax import probe
from simclr_jax.benchmark import apart, timing
from simclr_jax.table import Table

L2 = 1e-3  # the penalty

_ROWS, _WIDTH, _CLASSES = 5_000, 512, 10
_FITS = {
    "ours": ("logistic", "Fit"),
    "torchvision": ("torch_logistic", "Minibatches"),
    "kornia": ("torch_logistic", "FullBatch"),
}
_NOTE = (
    f"The objective is mean cross-entropy + {L2:g} / 2 · ‖weights‖², in float64; AdamW's decay is not "
    "that penalty, so that it ends elsewhere. The embeddings are made up; our first fit compiles."
)
_LABELS = {"ours": "ours, probe.fit", "torchvision": "AdamW, batches of 64", "kornia": "torch.optim.LBFGS"}


def embeddings() -> tuple[np.ndarray, np.ndarray]:
    """Made up after those of an encoder: cut off at zero, classes that overlap; then standardised.

    Returns:
      float32 [5000, 512], of columns with mean 0 and standard deviation 1, and int64 labels [5000].
    """
    rng = np.random.default_rng(0)
    labels = rng.integers(0, _CLASSES, _ROWS)
    centers = 0.25 * rng.standard_normal((_CLASSES, _WIDTH))
    h = np.maximum(centers[labels] + rng.standard_normal((_ROWS, _WIDTH)), 0)
    return ((h - h.mean(axis=0)) / h.std(axis=0)).astype(np.float32), labels


def objective(features: np.ndarray, labels: np.ndarray, weights: np.ndarray, bias: np.ndarray) -> float:
    """Mean cross-entropy + L2 / 2 · ‖weights‖², in float64.

    Args:
      features: [N, F].
      labels: int [N].
      weights: [F, C].
      bias: [C].
    """
    logits = features.astype(np.float64) @ weights.astype(np.float64) + bias
    top = logits.max(axis=1)
    normalizer = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    chosen = logits[np.arange(len(labels)), labels]
    return float(np.mean(normalizer - chosen) + L2 / 2 * np.sum(weights.astype(np.float64) ** 2))


class Fit:
    """`probe.fit`, timed."""

    def __init__(self, features: np.ndarray, labels: np.ndarray, l2: float):
        """Of features [N, F] and labels [N], with the penalty of `probe.fit`."""
        self._rows, self._l2 = (features, labels), l2
        self._found: probe.Classifier | None = None

    def time(self) -> float:
        """Seconds of a fit; the first one compiles."""
        began = time.perf_counter()
        self._found = probe.fit(*self._rows, classes=int(self._rows[1].max()) + 1, l2=self._l2)
        self.solution()  # which waits for the device
        return time.perf_counter() - began

    def solution(self) -> tuple[np.ndarray, np.ndarray]:
        """Weights [F, C] and bias [C] of the last fit, for features as they were given."""
        assert self._found is not None
        mean, std, weights, bias = map(np.asarray, self._found)
        weights = weights / std[:, None]
        return weights, bias - mean @ weights


def measure(frameworks: Sequence[str], repeats: int) -> dict[str, dict[str, Any]]:
    """Times the fits in turns, each in a process of its own.

    Args:
      frameworks: "ours"; "torchvision", batches of 64 and AdamW, as the UvA deep learning tutorial 17 writes
        it; "kornia", `torch.optim.LBFGS` on all rows.
      repeats: timed fits of each.

    Returns:
      By framework the figures for JSON: `first_seconds`, with compilation; `ms` a fit; `objective`, what the
      last one reached; and `times_slower` than the first framework; or of one that failed as `apart.Group`
      has it.
    """
    features, labels = embeddings()
    with contextlib.ExitStack() as stack:
        workers: dict[str, apart.Worker] = {}
        for name in frameworks:
            module, kind = _FITS[name]
            worker = apart.Worker(f"simclr_jax.benchmark.{module}", kind, features, labels, L2)
            workers[name] = stack.enter_context(worker)
        group = apart.Group(workers)
        first = {name: group.time(name) for name in workers}
        times = timing.told_in_turns({name: functools.partial(group.time, name) for name in workers}, repeats)
        solutions = {name: group.ask(name, "solution") for name in workers}
    run = [name for name in frameworks if name not in group.failed]
    figures = {
        name: {
            "first_seconds": round(first[name], 4),
            "ms": times[name].milliseconds(),
            "times_slower": round(times[name].median / times[run[0]].median, 3),
            "objective": round(objective(features, labels, *solutions[name]), 8),
        }
        for name in run
    }
    return {name: figures.get(name) or group.not_run(name) for name in frameworks}


def table(figures: Mapping[str, Mapping[str, Any]]) -> Table:
    """Of the figures of `measure`."""
    rows, notes = [], [_NOTE]
    for name, one in figures.items():
        if "not_run" in one:
            rows.append([_LABELS[name], *"––––––"])
            notes.append(f"{_LABELS[name]} was not run: {one['not_run']}.")
            continue
        times = [timing.short(one["ms"][which] / 1000) for which in ("median", "least", "most")]
        first = timing.short(one["first_seconds"])
        rows.append([_LABELS[name], *times, first, f"{one['objective']:.7f}", f"{one['times_slower']:.2f} x"])
    return Table(
        f"logistic: regression on {_ROWS:,} embeddings, {_WIDTH} wide, {_CLASSES} classes",
        ("", "s a fit", "least", "most", "first", "objective", "of the first"),
        rows,
        " ".join(notes),
    )
