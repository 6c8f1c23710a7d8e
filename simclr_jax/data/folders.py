"""Images that lie as files in a folder."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from simclr_jax import paths
from simclr_jax.data.sources import UNLABELLED, Source
from simclr_jax.errors import UserError

EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TEST_FOLDERS = ("test", "val", "validation")  # beside `train`, where the two lie apart


@dataclasses.dataclass(frozen=True)
class _FolderSource:
    name: str
    fingerprint: Mapping[str, Any]
    root: paths.Path
    files: tuple[str, ...]  # below `root`
    class_names: tuple[str, ...] = ()
    labels: tuple[int, ...] = ()  # of each file, where there are classes

    def __len__(self) -> int:
        return len(self.files)

    def record(self, index: int) -> tuple[bytes, int]:
        label = self.labels[index] if self.labels else UNLABELLED
        file = self.root / self.files[index]
        with paths.explained("read", file):
            return file.read_bytes(), label

    def describe(self, index: int) -> str:
        return str(self.root / self.files[index])


def folder_source(path: str) -> Source:
    """Opens the images in a folder, at any depth, as unlabelled, in the order of their paths.

    Read are files whose names end in one of `EXTENSIONS`, in any case. Hidden files and folders are
    left out, and links to folders are not followed.

    Raises:
        UserError: if there is no such folder, it cannot be listed, or it holds no images.
    """
    root = _existing_folder(path)
    files, others = _images_below(root)
    if not files:
        raise UserError(f"no images in {root} ({others} other files); read are {', '.join(EXTENSIONS)}")
    return _FolderSource(str(root), {"folder": _content(root, files)}, root, tuple(files))


def labelled_folder_source(path: str, split: str) -> Source:
    """Opens the images in a folder with one subfolder a class; the classes are in the order of their names.

    Where the folder has a subfolder `train` and one of `TEST_FOLDERS`, these hold the classes. Otherwise
    one image of five in each class, the same ones always, is `test`, and the others are `train`.

    Args:
        path: the folder.
        split: `train` or `test`.

    Raises:
        UserError: if there is no such folder or split, it cannot be listed, or a class has no images.
    """
    root = _existing_folder(path)
    if split not in ("train", "test"):
        raise UserError(f"a folder has the splits train and test, not {split!r}")
    test_folder = next((root / name for name in TEST_FOLDERS if (root / name).is_dir()), None)
    apart = test_folder is not None and (root / "train").is_dir()
    train_folder = root / "train" if apart else root
    class_names = tuple(sorted(entry.name for entry in train_folder.iterdir() if _is_class(entry)))
    if not class_names:
        raise UserError(f"{train_folder} has no subfolders; put the images of each class into one of its own")
    folder = test_folder if apart and split == "test" else train_folder
    assert folder is not None

    files, labels = [], []
    for label, name in enumerate(class_names):
        found = _images_below(folder / name)[0] if (folder / name).is_dir() else []
        if not apart:
            # By a hash, as files in the order of their names are often alike, such as the frames of a video.
            shuffled = sorted(found, key=lambda file: hashlib.sha256(file.encode()).digest())
            of_test = set(shuffled[: len(found) // 5])
            found = [file for file in found if (file in of_test) == (split == "test")]
        if not found and split == "train":
            raise UserError(
                f"class {name} has no images to learn from in {folder / name}; add some or remove it"
            )
        files += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    if not files:
        raise UserError(
            f"no images to test with in {root}: one of five in each class is taken, so a class needs 5; "
            "or make subfolders train and test"
        )
    return _FolderSource(
        f"{root}[{split}]",
        {"folder": _content(folder, files), "classes": class_names},
        folder,
        tuple(files),
        class_names,
        tuple(labels),
    )


def _existing_folder(path: str) -> paths.Path:
    root = paths.parse(path)
    with paths.explained("list", root):
        if not root.exists():
            raise UserError(f"there is no folder {root}")
        if not root.is_dir():
            raise UserError(f"{root} is a file; give the folder that holds the images")
    return root


def _is_class(entry: paths.Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _images_below(root: paths.Path) -> tuple[list[str], int]:
    """The images below a folder, as sorted paths from there, and the number of other files."""
    files: list[str] = []
    others = 0
    with paths.explained("list", root):
        for file in _files_below(root):
            if file.suffix.lower() in EXTENSIONS and file.is_file():
                files.append(file.relative_to(root).as_posix())
            else:
                others += 1
    return sorted(files), others


def _files_below(root: paths.Path) -> Iterator[paths.Path]:
    if isinstance(root, pathlib.Path):
        for parent, folders, names in os.walk(root, onerror=_cannot_list):
            folders[:] = [name for name in folders if not name.startswith(".")]
            yield from (pathlib.Path(parent, name) for name in names if not name.startswith("."))
        return
    for entry in paths.entries(root):  # what epath 1.15 walks through has lost its gs://
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(entry)
        else:
            yield entry


def _content(root: paths.Path, files: Sequence[str]) -> str:
    """A hash that changes with the names, sizes and times of the files."""
    content = hashlib.sha256()
    with paths.explained("list", root):
        for file in files:
            content.update(json.dumps([file, *paths.size_and_time(root / file)]).encode())
    return content.hexdigest()


def _cannot_list(error: OSError) -> None:
    raise UserError(f"cannot list {error.filename} ({error.strerror})") from error
