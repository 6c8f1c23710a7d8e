"""Paths as users write them: on a local disk, or gs:// on Google Cloud Storage."""

import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from etils import epath

from simclr_jax.errors import UserError

Path = pathlib.Path | epath.Path  # local | remote

_REMOTE = "gs://"
_PARTIAL = ".partial"


def parse(text: str) -> Path:
    """The path that a user means, with `~` expanded, or a remote one for gs://BUCKET/NAME.

    Raises:
        UserError: for another scheme, or where the bucket cannot be reached, for example without gcsfs.
    """
    if "://" not in text:
        return pathlib.Path(os.path.expanduser(text))
    if not text.startswith(_REMOTE):
        raise UserError(f"cannot use {text}; name a local path or a {_REMOTE} one")
    _require_bucket(_REMOTE + text.removeprefix(_REMOTE).partition("/")[0])
    return epath.Path(text)


def is_remote(path: Path) -> bool:
    """Whether `path` is on object storage, which has no appending, no folders of their own and no locks."""
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """`path` from the root; a remote one is."""
    return path.absolute() if isinstance(path, pathlib.Path) else path  # epath takes gs:// for relative


def make_folder(path: Path) -> None:
    """Makes a local folder and those above it; a remote one comes with its first file."""
    if isinstance(path, pathlib.Path):
        path.mkdir(parents=True, exist_ok=True)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder."""
    found = list(folder.iterdir())
    if isinstance(folder, pathlib.Path):
        return found
    # The object `runs/a/`, which is how the web console makes an empty folder, is listed as in `runs/a`.
    return [entry for entry in found if entry.name != folder.name or entry.exists()]


def size_and_time(path: Path) -> tuple[int, int]:
    """Bytes of a file, and when it changed: ns since 1970, of a remote file s."""
    if isinstance(path, pathlib.Path):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    status = path.stat()
    return status.length, status.mtime


def write(path: Path, data: bytes) -> None:
    """Writes a file so that no reader meets half of it: a local one beside `path` and then moved into place.

    Raises:
        OSError: if a local file cannot be written.
        UserError: if a remote one cannot.
    """
    if isinstance(path, pathlib.Path):
        partial = path.with_name(path.name + _PARTIAL)
        partial.write_bytes(data)
        os.replace(partial, path)
        return
    with explained("write", path):
        path.write_bytes(data)


def copy(source: Path, target: Path) -> None:
    """Copies a file, or a folder with all below it, to or from remote storage, over what is there.

    Raises:
        UserError: if that fails.
    """
    with explained("copy from", source), explained("copy to", target):
        if source.is_dir():
            for entry in entries(source):
                copy(entry, target / entry.name)
            return
        make_folder(target.parent)
        epath.Path(source).copy(target, overwrite=True)


@contextlib.contextmanager
def local(path: Path) -> Iterator[pathlib.Path]:
    """A local path to write a file or folder to: `path`, or one that is copied to it at the end."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        aside = pathlib.Path(folder, path.name)
        yield aside
        copy(aside, path)


@contextlib.contextmanager
def local_copy(path: Path) -> Iterator[pathlib.Path]:
    """A local file to read: `path`, or a copy of a remote one for as long as the context lasts."""
    if isinstance(path, pathlib.Path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        aside = pathlib.Path(folder, path.name)
        copy(path, aside)
        yield aside


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write files to, which takes the place of `folder` once they are whole and on the disk."""
    partial = folder.with_name(folder.name + _PARTIAL)
    try:
        partial.mkdir(parents=True)
        yield partial
        for file in (*partial.iterdir(), partial):
            _sync(file)
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def explained(action: str, path: Path) -> Iterator[None]:
    """Turns what remote storage raises, nearly any type, into a `UserError`; of a local `path`, nothing."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_remote(path):
            raise
        raise UserError(
            f"cannot {action} {path} ({_reason(error)}); put it right and run the same command again"
        ) from error


@functools.cache  # what it raises is not kept
def _require_bucket(bucket: str) -> None:
    import fsspec  # only where needed: 0.1 s

    try:
        fsspec.get_filesystem_class("gs")
    except ImportError as error:
        raise UserError(f"{bucket} needs gcsfs; run: pip install gcsfs") from error
    try:
        found = epath.Path(bucket).exists()
    except Exception as error:  # gcsfs and what it is built on raise nearly any type
        raise UserError(
            f"cannot reach {bucket} ({_reason(error)}); see that the name is right and you are signed in, "
            "as by: gcloud auth application-default login"
        ) from error
    if not found:
        raise UserError(f"there is no bucket {bucket}, or you may not see it")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
