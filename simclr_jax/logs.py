"""What a run leaves for people to read: a progress line, metrics.jsonl, TensorBoard, small JSON files."""

import contextlib
import importlib.metadata
import json
import pathlib
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from simclr_jax import __version__, hosts, paths

_torch_is_unloaded = sys.modules.setdefault("torch", None) is None  # type: ignore[arg-type]
try:  # tensorboardX imports PyTorch wherever it is installed: seconds, and a CUDA context
    from tensorboardX import SummaryWriter
finally:
    if _torch_is_unloaded:
        del sys.modules["torch"]

_METRICS = "metrics.jsonl"


def say(text: str) -> None:
    """Prints a line, above the progress line where there is one; of several processes the first does."""
    if hosts.is_first():
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


def versions() -> dict[str, str]:
    """Of the packages that decide what a run learns; this one may run where it is not installed."""
    others = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    return {"simclr_jax": __version__, **others}


def write_json(path: paths.Path, value: Any) -> None:
    """Writes `value` so that no reader meets half a file. Errors are those of `paths.write`."""
    paths.write(path, (json.dumps(value, indent=2) + "\n").encode())


def read_metrics(path: paths.Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`; none where there is no such file."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            records.append(json.loads(line))
        except ValueError:  # the last line of a killed run may be half a line
            break
    return records


def write_projector(
    folder: pathlib.Path,
    embeddings: Mapping[str, np.ndarray],
    *,
    labels: Sequence[str],
    thumbnails: np.ndarray,
) -> None:
    """Writes embeddings of the same images for TensorBoard's projector, in place of what `folder` held.

    Args:
      folder: `tensorboard --logdir` of it shows them.
      embeddings: float [n, F] by name.
      labels: of the images.
      thumbnails: uint8 [n, S, S, 3].
    """
    if folder.exists():
        shutil.rmtree(folder)
    pictures = thumbnails.transpose(0, 3, 1, 2) / np.float32(255)
    # It draws thumbnails on a square larger than they fill, whose rest is whatever was in memory.
    with SummaryWriter(str(folder)) as writer, np.errstate(over="ignore", invalid="ignore"):
        for number, (name, features) in enumerate(embeddings.items()):
            tag = f"{number}_" + re.sub(r"\W+", "_", name).strip("_")
            writer.add_embedding(features, list(labels), pictures, tag=tag)


class MetricsFile:
    """`metrics.jsonl`: one JSON object a logged step."""

    def __init__(self, path: pathlib.Path, *, step: int):
        """Opens `path` to go on after `step`; what an interrupted run logged beyond it is dropped."""
        self.records = [record for record in read_metrics(path) if record["step"] <= step]
        paths.write(path, "".join(json.dumps(record) + "\n" for record in self.records).encode())
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends `record`, which has a `step`."""
        self.records.append(record)
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class RunLog:
    """The log of a run in its folder, and its progress line.

    Object storage has no appending: for a remote folder the files are written aside, and `sync` copies them.
    """

    def __init__(self, workdir: paths.Path, *, step: int, total_steps: int, steps_per_epoch: int):
        """Goes on after `step`, where an earlier part of the run left off."""
        self._workdir, self._aside = workdir, None
        folder = workdir
        if not isinstance(folder, pathlib.Path):
            self._aside = tempfile.TemporaryDirectory()
            folder = pathlib.Path(self._aside.name)
            if (workdir / _METRICS).exists():
                paths.copy(workdir / _METRICS, folder / _METRICS)
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        self._epochs = -(-total_steps // steps_per_epoch)
        self._file = MetricsFile(folder / _METRICS, step=step)
        self._tensorboard = SummaryWriter(str(folder), purge_step=step + 1 if step else None)
        self._live = sys.stderr.isatty()
        self._last_line = time.monotonic()
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            disable=not self._live,
            dynamic_ncols=True,
            smoothing=0.05,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {remaining} left",
        )
        self._bar.set_description_str(self._epoch_text(step))

    @property
    def records(self) -> list[dict[str, Any]]:
        """All that `metrics.jsonl` holds."""
        return self._file.records

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` of `step` in `metrics.jsonl` and TensorBoard."""
        self._file.write({"step": step, "epoch": round(step / self._steps_per_epoch, 4), **values})
        for name, value in values.items():
            self._tensorboard.add_scalar(name, value, step)

    def image(self, name: str, image: np.ndarray) -> None:
        """Shows `image`, uint8 [H, W, 3], in TensorBoard."""
        self._tensorboard.add_image(name, image, 0, dataformats="HWC")

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Moves the progress line to `step`; where nobody watches a terminal, a line every 10 s.

        Args:
          step: steps done.
          values: newest metrics; `loss` and `images_per_second` are shown once they are there.
        """
        text = f"loss {values['loss']:.3f}" if "loss" in values else "compiling"
        if "images_per_second" in values:
            text += f", {values['images_per_second']:,.0f} images/s"
        if self._live:
            self._bar.set_description_str(f"{self._epoch_text(step)}, {text}", refresh=False)
            self._bar.update(step - self._bar.n)
        elif step == self._total_steps or time.monotonic() - self._last_line > 10:
            self._last_line = time.monotonic()
            say(f"{self._epoch_text(step)}, step {step}/{self._total_steps}: {text}")

    def sync(self) -> None:
        """Copies what was written to a remote folder; a local one has it. Errors are of `paths.copy`.

        TensorBoard's writer has a thread of its own, so that its newest events may come with the next copy.
        """
        if self._aside is not None:
            self._tensorboard.flush()
            paths.copy(pathlib.Path(self._aside.name), self._workdir)

    def close(self) -> None:
        """Flushes, closes and copies everything; a full disk has been told of where it mattered."""
        self._bar.close()
        for part in (self._file, self._tensorboard):
            with contextlib.suppress(OSError):
                part.close()
        if self._aside is not None:
            with self._aside as folder:
                paths.copy(pathlib.Path(folder), self._workdir)

    def _epoch_text(self, step: int) -> str:
        epoch = min(step // self._steps_per_epoch + 1, self._epochs)
        return f"epoch {epoch}/{self._epochs}"


class SilentLog:
    """What other processes than the first have for a `RunLog`: it knows the records, and writes nothing."""

    def __init__(self, workdir: paths.Path, *, step: int):
        """Goes on after `step`, as the `RunLog` does."""
        records = read_metrics(workdir / _METRICS)
        self.records = [record for record in records if record["step"] <= step]

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Remembers `values` of `step`."""
        self.records.append({"step": step, **values})

    def image(self, name: str, image: np.ndarray) -> None:
        """Shows nothing."""

    def progress(self, step: int, values: Mapping[str, float]) -> None:
        """Shows nothing."""

    def sync(self) -> None:
        """There is nothing to copy."""

    def close(self) -> None:
        """There is nothing to close."""
