"""Packs: the images of a source, decoded once, as memory-mapped arrays of one size."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import warnings
from collections.abc import Generator, Iterator
from typing import IO

import numpy as np
import PIL
from tqdm import tqdm

from simclr_jax import paths
from simclr_jax.data.decode import MAX_PIXELS, UnreadableImage, decode_rgb
from simclr_jax.data.sources import Source, cache_dir, local_cache_dir
from simclr_jax.errors import UserError

_FORMAT = 1  # of the folder; a change makes every older pack be built anew
_PARTIAL = ".partial"
_SUMMARY = "pack.json"
_FILES = ("canvas.npy", "extent.npy", "label.npy", _SUMMARY)  # a remote pack with the last is whole
_NAMED = 10  # unreadable images that are named in warnings
_CHUNK_BYTES = 8_000_000
_LOG = logging.getLogger("simclr_jax")


@dataclasses.dataclass(frozen=True)
class Pack:
    """The readable images of a source, in its order.

    Attributes:
        canvas: uint8 [N, S, S, 3], read-only, memory-mapped; each image at the top left, zeros around.
        extent: int32 [N, 2], the height and width of each image on its canvas.
        label: int32 [N], -1 where an image is unlabelled.
        class_names: the names of labels 0, 1, ...; empty where nothing is labelled.
        name: what messages call it: the name of its source.
        unreadable: how many images of the source were left out.
    """

    canvas: np.ndarray
    extent: np.ndarray
    label: np.ndarray
    class_names: tuple[str, ...]
    name: str
    unreadable: int

    def __len__(self) -> int:
        return len(self.canvas)

    def take(self, rows: np.ndarray) -> "Pack":
        """Some of the images, int [n] rows in ascending order without repetition, copied into memory."""
        if len(rows) == len(self):
            return self
        return dataclasses.replace(
            self, canvas=self.canvas[rows], extent=self.extent[rows], label=self.label[rows]
        )


def open_pack(
    source: Source,
    *,
    size: int,
    cache: paths.Path | None = None,
    max_unreadable: float = 0.01,
    max_pixels: int = MAX_PIXELS,
    workers: int | None = None,
    progress: bool = True,
) -> Pack:
    """Opens the pack of a source at one size, after building it if the cache has none.

    A pack that was cut short is never taken for a finished one. Of several processes that want a
    pack at once, one builds and the others wait. As a pack is memory-mapped, one in a remote cache is
    copied to the local one, and one that a remote cache lacks is built locally and copied there.

    Args:
        source: the encoded images.
        size: S, the side of a canvas in pixels; larger images are reduced to it.
        cache: the folder that keeps packs, local or remote; default `cache_dir()`.
        max_unreadable: the largest share of images that may be left out as unreadable.
        max_pixels: images of more pixels count as unreadable.
        workers: decoding threads; default one a processor.
        progress: whether to show a progress bar on stderr.

    Raises:
        UserError: if too many or all images are unreadable, or the cache cannot take the pack.
    """
    packs = (cache or cache_dir()) / "packs"
    shared = None
    if not isinstance(packs, pathlib.Path):
        packs, shared = local_cache_dir() / "packs", packs
    identity = {
        "format": _FORMAT,
        "source": source.fingerprint,
        "size": size,
        "max_pixels": max_pixels,
        "pillow": PIL.__version__,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    folder = packs / key
    shared = shared and shared / key

    opened, built = _open_finished(folder, source, size), False
    if opened is None:
        needed = len(source) * (size * size * 3 + 12)
        with _explained(packs, needed), _sole_builder(packs):
            opened = _open_finished(folder, source, size)  # another process may have built it by now
            if opened is None:
                if folder.exists():
                    _LOG.warning("the pack in %s is damaged and is built anew", folder)
                _require_room(packs, needed)
                if shared is not None and _fetch(shared, folder, progress):
                    opened = _open_finished(folder, source, size)
            if opened is None:
                images = _decoded(source, size, max_pixels, workers or os.cpu_count() or 1)
                _build(folder, source, size, images, max_unreadable, progress)
                opened = _open_finished(folder, source, size)
                if opened is None:
                    raise UserError(f"the pack just written to {folder} cannot be read back")
                built = True
    pack, summary = opened
    if shared is not None:
        _share(folder, shared, progress, again=built)
    if not built:
        _report(summary, source.name, max_unreadable)
    return pack


@dataclasses.dataclass(frozen=True)
class _Summary:
    """What pack.json holds."""

    name: str
    images: int  # of the source
    unreadable: int
    named: list[str]  # the first unreadable ones: "file: reason"


def _open_finished(folder: pathlib.Path, source: Source, size: int) -> tuple[Pack, _Summary] | None:
    """The pack in `folder`, or None if there is none or its files do not fit together."""
    try:
        summary = _Summary(**json.loads((folder / _SUMMARY).read_text()))
        canvas = np.load(folder / "canvas.npy", mmap_mode="r")
        extent = np.load(folder / "extent.npy")
        label = np.load(folder / "label.npy")
    except (OSError, ValueError, TypeError, EOFError):
        return None
    count = len(source) - summary.unreadable
    if canvas.shape != (count, size, size, 3) or len(extent) != count or len(label) != count:
        return None
    pack = Pack(canvas, extent, label, source.class_names, source.name, summary.unreadable)
    return pack, summary


def _fetch(shared: paths.Path, folder: pathlib.Path, progress: bool) -> bool:
    """Copies a pack from the remote cache; whether there is one."""
    with paths.explained("read", shared):
        if not (shared / _SUMMARY).exists():
            return False
    if progress:
        print(f"copying the pack from {shared}", file=sys.stderr)
    with paths.whole_folder(folder) as partial:
        for name in _FILES:
            paths.copy(shared / name, partial / name)
    return True


def _share(folder: pathlib.Path, shared: paths.Path, progress: bool, *, again: bool) -> None:
    """Copies a pack to the remote cache, if it is there only `again`; where that fails, only warns."""
    try:
        with paths.explained("read", shared):
            if not again and (shared / _SUMMARY).exists():
                return
        if progress:
            print(f"copying the pack to {shared}", file=sys.stderr)
        for name in _FILES:
            paths.copy(folder / name, shared / name)
    except UserError as error:
        _LOG.warning("other machines have to pack these images again: %s", error)


def _report(summary: _Summary, name: str, max_unreadable: float) -> None:
    """Warns of unreadable images, and raises where they are too many."""
    if not summary.unreadable:
        return
    for line in summary.named:
        _LOG.warning("left out as unreadable: %s", line)
    if summary.unreadable > len(summary.named):
        _LOG.warning("left out as unreadable: %d more", summary.unreadable - len(summary.named))
    if summary.unreadable == summary.images:
        raise UserError(
            f"none of the {summary.images} images of {name} can be read; the first: {summary.named[0]}"
        )
    if summary.unreadable > max_unreadable * summary.images:
        raise UserError(
            f"{summary.unreadable} of {summary.images} images of {name} cannot be read, more than "
            f"the share data.max_unreadable={max_unreadable:g}; the first: {summary.named[0]}"
        )


@dataclasses.dataclass(frozen=True)
class _Chunk:
    canvas: np.ndarray  # uint8 [n, S, S, 3]
    extent: np.ndarray  # int32 [n, 2]
    label: np.ndarray  # int32 [n]
    tried: int
    unreadable: list[str]


def _decoded(source: Source, size: int, max_pixels: int, workers: int) -> Generator[_Chunk, None, None]:
    """Decodes the source in parallel, in order, a few chunks ahead of what is consumed."""
    step = min(64, max(1, _CHUNK_BYTES // (size * size * 3)))
    spans = iter(range(start, min(start + step, len(source))) for start in range(0, len(source), step))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[concurrent.futures.Future[_Chunk]] = collections.deque()
        try:
            for span in spans:
                pending.append(pool.submit(_decode_chunk, source, span, size, max_pixels))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode_chunk(source: Source, span: range, size: int, max_pixels: int) -> _Chunk:
    canvas = np.zeros((len(span), size, size, 3), np.uint8)
    extents, labels, unreadable = [], [], []
    for index in span:
        try:
            data, label = source.record(index)
            image = decode_rgb(data, size=size, max_pixels=max_pixels)
        except (OSError, UnreadableImage) as error:
            unreadable.append(f"{source.describe(index)}: {error}")
            continue
        height, width = image.shape[:2]
        canvas[len(labels), :height, :width] = image
        extents.append((height, width))
        labels.append(label)
    return _Chunk(
        canvas=canvas[: len(labels)],
        extent=np.array(extents, np.int32).reshape(-1, 2),
        label=np.array(labels, np.int32),
        tried=len(span),
        unreadable=unreadable,
    )


def _build(
    folder: pathlib.Path,
    source: Source,
    size: int,
    chunks: Generator[_Chunk, None, None],
    max_unreadable: float,
    progress: bool,
) -> None:
    with paths.whole_folder(folder) as partial:
        summary = _write(partial, source, size, chunks, progress)
        _report(summary, source.name, max_unreadable)


def _write(
    folder: pathlib.Path,
    source: Source,
    size: int,
    chunks: Generator[_Chunk, None, None],
    progress: bool,
) -> _Summary:
    extents, labels = [np.zeros((0, 2), np.int32)], [np.zeros(0, np.int32)]
    unreadable: list[str] = []
    live = progress and sys.stderr.isatty()
    if progress and not live:
        print(f"packing {len(source):,} images of {source.name}", file=sys.stderr)
    with (
        warnings.catch_warnings(),
        contextlib.closing(chunks),
        (folder / "canvas.npy").open("wb") as file,
        tqdm(total=len(source), desc=f"packing {source.name}", unit="image", disable=not live) as bar,
    ):
        warnings.filterwarnings("ignore", module=r"PIL\.")  # on damaged metadata of sound pixels
        # Written front to back, as a full disk ends a process that writes to a memory map. How many
        # images are readable is known at the end; numpy pads headers so that the count can grow.
        _write_header(file, 0, size)
        for chunk in chunks:
            file.write(chunk.canvas.data)
            extents.append(chunk.extent)
            labels.append(chunk.label)
            unreadable += chunk.unreadable
            bar.update(chunk.tried)
        file.seek(0)
        _write_header(file, len(source) - len(unreadable), size)
    np.save(folder / "extent.npy", np.concatenate(extents))
    np.save(folder / "label.npy", np.concatenate(labels))
    summary = _Summary(source.name, len(source), len(unreadable), unreadable[:_NAMED])
    (folder / _SUMMARY).write_text(json.dumps(dataclasses.asdict(summary), indent=2))
    return summary


def _write_header(file: IO[bytes], count: int, size: int) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, size, size, 3)}
    np.lib.format.write_array_header_1_0(file, header)


@contextlib.contextmanager
def _sole_builder(packs: pathlib.Path) -> Iterator[None]:
    """Holds the lock on building in this cache, and clears what killed builds left there.

    The system gives a lock back when its process dies, so whoever holds it knows that every partial
    folder is a leftover.
    """
    packs.mkdir(parents=True, exist_ok=True)
    with (packs / ".lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _LOG.warning("waiting for another process that is packing images in %s", packs)
            fcntl.flock(file, fcntl.LOCK_EX)
        for leftover in packs.glob(f"*{_PARTIAL}"):
            shutil.rmtree(leftover)
        yield


@contextlib.contextmanager
def _explained(packs: pathlib.Path, needed: int) -> Iterator[None]:
    """Turns what the disk refuses into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(packs, needed) from error
        raise UserError(
            f"cannot write to the cache {packs} ({error.strerror or error}); "
            "set SIMCLR_JAX_CACHE to a folder that can be written"
        ) from error


def _require_room(packs: pathlib.Path, needed: int) -> None:
    if needed > shutil.disk_usage(packs).free:
        raise _no_room(packs, needed)


def _no_room(packs: pathlib.Path, needed: int) -> UserError:
    return UserError(
        f"no room in the cache {packs}: {needed / 1e9:.3g} GB needed, "
        f"{shutil.disk_usage(packs).free / 1e9:.3g} GB free; make room or set SIMCLR_JAX_CACHE to "
        "a larger disk"
    )
