"""Where encoded images come from: the protocol of a source, and prepared TFDS data sets."""

import dataclasses
import difflib
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from simclr_jax import paths
from simclr_jax.errors import UserError

SHAPES = "shapes"
ARRAY_RECORD = "array_record"
UNLABELLED = -1

_INFO_FILE = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# name[/config][:version], as TFDS writes it
_DATASET = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")

# Of files: name, bytes, time of change, first record and number of records.
_Shards = list[tuple[str, int, int, int, int]]


class Source(Protocol):
    """A fixed sequence of encoded images; reading it from many threads is safe."""

    @property
    def name(self) -> str:
        """What messages call it, e.g. `cifar10[train]` or the folder."""
        ...

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of labels 0, 1, ...; empty where nothing is labelled."""
        ...

    @property
    def fingerprint(self) -> Mapping[str, Any]:
        """JSON values that change whenever the images, labels or their order do."""
        ...

    def __len__(self) -> int: ...

    def record(self, index: int) -> tuple[bytes, int]:
        """The encoded image and its label, `UNLABELLED` if it has none.

        Raises:
            OSError: if it cannot be read.
        """
        ...

    def describe(self, index: int) -> str:
        """What a message about this one image calls it."""
        ...


def cache_dir() -> paths.Path:
    """The folder for what is made once and kept: `$SIMCLR_JAX_CACHE`, else the user's cache.

    Raises `UserError` if it is remote and cannot be reached.
    """
    own = os.environ.get("SIMCLR_JAX_CACHE")
    return paths.parse(own) if own else _user_cache_dir()


def local_cache_dir() -> pathlib.Path:
    """`cache_dir()`, or the user's cache where that is remote; for what has to lie on a disk."""
    folder = cache_dir()
    return folder if isinstance(folder, pathlib.Path) else _user_cache_dir()


def _user_cache_dir() -> pathlib.Path:
    if user_cache := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(user_cache).expanduser() / "simclr_jax"
    return pathlib.Path.home() / ".cache" / "simclr_jax"


def tfds_dir(dataset: str, data_dir: str | None = None) -> paths.Path:
    """The TFDS folder that holds `dataset`: `data_dir` or its default.

    The default is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, as in TFDS. `shapes`, which is drawn
    on first use, goes to the local cache instead, as the folder of the others may be read-only.
    """
    if data_dir is not None:
        return paths.parse(data_dir)
    if dataset == SHAPES:
        return local_cache_dir() / "tfds"
    return paths.parse(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


@dataclasses.dataclass(frozen=True)
class _TfdsSource:
    name: str
    class_names: tuple[str, ...]
    fingerprint: Mapping[str, Any]
    records: Sequence[Any]
    image_key: str
    label_key: str | None

    def __len__(self) -> int:
        return len(self.records)

    def record(self, index: int) -> tuple[bytes, int]:
        try:
            features = self.records[index]
        except UserError:
            raise
        except Exception as error:  # a damaged shard makes the reader raise nearly any type
            raise OSError(f"damaged record: {error}") from error
        label = UNLABELLED if self.label_key is None else int(features[self.label_key])
        return features[self.image_key], max(label, UNLABELLED)

    def describe(self, index: int) -> str:
        return f"{self.name} record {index}"


def tfds_source(dataset: str, split: str, *, data_dir: str | None = None) -> Source:
    """Opens a split of a TFDS image data set that was prepared as array_record.

    It needs neither TensorFlow nor the network. The first image feature is read, and the first
    class label if there is one. `shapes` is drawn on the first call.

    Args:
        dataset: `name`, `name/config` or `name/config:version`.
        split: a TFDS split, e.g. `train`, `unlabelled`, `train+test` or `train[:10%]`.
        data_dir: the TFDS folder; its default is that of `tfds_dir`.

    Raises:
        UserError: if the data set or split is unknown, empty or without images, or the data set is
            not prepared in that folder, or not as array_record.
    """
    prepared = _prepared(dataset, data_dir)
    label_key = prepared.label_key
    shards = _shards(prepared, dataset, split)
    fingerprint = {
        "tfds": prepared.builder.info.full_name,
        "keys": [prepared.image_key, label_key],
        "shards": shards,
    }
    if paths.is_remote(prepared.folder):
        records = _FetchedRecords(prepared, split, shards, fingerprint)
    else:
        records = prepared.read(split)
    return _TfdsSource(
        name=f"{dataset}[{split}]",
        class_names=prepared.class_names,
        fingerprint=fingerprint,
        records=records,
        image_key=prepared.image_key,
        label_key=label_key,
    )


class Description(NamedTuple):
    """What a data set says of itself."""

    splits: tuple[str, ...]
    class_names: tuple[str, ...]  # empty where nothing is labelled
    side: int | None  # pixels of the longer side, where all images are of one size


def describe_tfds(dataset: str, *, data_dir: str | None = None) -> Description:
    """Describes a prepared TFDS image data set. Arguments and errors are those of `tfds_source`."""
    prepared = _prepared(dataset, data_dir)
    info = prepared.builder.info
    height, width = info.features[prepared.image_key].shape[:2]
    return Description(
        tuple(sorted(info.splits)), prepared.class_names, max(height, width) if height and width else None
    )


class _Prepared(NamedTuple):
    """A data set that was prepared as array_record."""

    folder: paths.Path
    builder: Any  # its decorated methods lost their types
    image_key: str
    label_key: str | None
    command: str  # that prepares it

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.builder.info.features[self.label_key].names) if self.label_key else ()

    def read(self, split: str) -> Sequence[Any]:
        import tensorflow_datasets as tfds

        return self.builder.as_data_source(split, decoders={self.image_key: tfds.decode.SkipDecoding()})


class _FetchedRecords(Sequence[Any]):
    """Records of a remote data set; its shards are copied to the local cache when the first is read.

    array_record 0.8.6 can read gs:// itself, but with a request for each record.
    """

    def __init__(self, prepared: _Prepared, split: str, shards: _Shards, fingerprint: Mapping[str, Any]):
        """Copies nothing yet, as a pack may be there already."""
        self._prepared, self._split, self._shards = prepared, split, shards
        key = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()[:32]
        self._folder = local_cache_dir() / "shards" / key
        self._lock = threading.Lock()
        self._records: Sequence[Any] | None = None

    def __len__(self) -> int:
        return sum(take for *_, take in self._shards)

    def __getitem__(self, index: Any) -> Any:
        with self._lock:
            if self._records is None:
                self._records = self._fetch()
        return self._records[index]

    def _fetch(self) -> Sequence[Any]:
        import tensorflow_datasets as tfds

        remote = self._prepared.folder
        if not self._folder.is_dir():
            with paths.whole_folder(self._folder) as folder:
                about = [entry.name for entry in remote.iterdir() if entry.suffix in (".json", ".txt")]
                for name in (*about, *dict.fromkeys(name for name, *_ in self._shards)):
                    paths.copy(remote / name, folder / name)
        builder: Any = tfds.builder_from_directory(self._folder)
        _use_array_record(builder)
        return self._prepared._replace(builder=builder).read(self._split)


def _use_array_record(builder: Any) -> None:
    builder.info.set_file_format(ARRAY_RECORD, override=True, override_if_initialized=True)


def prepare_command(dataset: str, data_dir: str | None) -> str:
    """What prepares `dataset` in `data_dir`; by way of a disk where TFDS cannot write."""
    command = f"python -m simclr_jax.prepare {dataset}"
    root = tfds_dir(dataset, data_dir)
    if paths.is_remote(root):
        name = re.split("[/:]", dataset)[0]
        return f"{command} --data_dir tfds && gcloud storage cp -r tfds/{name} {root}/"
    return command if data_dir is None else f"{command} --data_dir {data_dir}"


def _prepared(dataset: str, data_dir: str | None) -> _Prepared:
    import tensorflow_datasets as tfds

    root = tfds_dir(dataset, data_dir)
    command = prepare_command(dataset, data_dir)
    if dataset == SHAPES and isinstance(root, pathlib.Path):
        _draw_shapes(root)
    folder = prepared_folder(dataset, root)
    if folder is None:
        there = ", ".join(_prepared_names(dataset, root))
        raise UserError(
            f"{dataset} is not prepared in {root}"
            f"{f' (prepared there: {there})' if there else ''}; run: {command}"
        )
    builder: Any = tfds.builder_from_directory(folder)
    formats = {file_format.value for file_format in builder.info.available_file_formats()}
    if ARRAY_RECORD not in formats:
        raise UserError(
            f"{dataset} is prepared in {folder} as {', '.join(sorted(formats))}, which cannot be read "
            f"without TensorFlow; delete that folder or choose another data_dir, then run: {command}"
        )
    _use_array_record(builder)
    features: Mapping[str, Any] = dict(builder.info.features)
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    if not images:
        raise UserError(
            f"{dataset} has no image among its features ({', '.join(features)}); choose an image data set"
        )
    return _Prepared(folder, builder, images[0], labels[0] if labels else None, command)


def prepared_folder(dataset: str, root: paths.Path) -> paths.Path | None:
    """The folder below `root` where TFDS prepared `dataset`, or None if it did not.

    Without a config it is the default one; without a version, the newest there.

    Raises:
        UserError: if TFDS knows no such data set or config, and none was prepared either.
    """
    import tensorflow_datasets as tfds

    match = _DATASET.fullmatch(dataset)
    if match is None:
        raise UserError(f"{dataset!r} is no data set name; write name, name/config or name:1.2.3")
    name, config, version = match["name"], match["config"], match["version"]

    folder = root / name / (config or "")
    known = tfds.list_builders(with_community_datasets=False)
    if name in known:
        configs = tuple(tfds.builder_cls(name).builder_configs)
        if config is None and configs:
            folder = root / name / configs[0]
        elif config is not None and config not in configs and not folder.is_dir():
            raise UserError(f"{name} has no config {config}{_suggestion(config, configs)}")
    elif not (name == SHAPES or (root / name).is_dir()):
        raise UserError(f"there is no data set {name} in TFDS or {root}{_suggestion(name, [*known, SHAPES])}")

    versions = {
        tuple(int(part) for part in file.parent.name.split(".")): file.parent
        for file in folder.glob(f"*/{_INFO_FILE}")
        if _VERSION.fullmatch(file.parent.name) and version in (None, file.parent.name)
    }
    return versions[max(versions)] if versions else None


def _suggestion(word: str, choices: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, choices)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    if len(choices) <= 20:
        return f"; choose from: {', '.join(choices) or 'none'}"
    return "; the names are at https://www.tensorflow.org/datasets/catalog/overview"


def _prepared_names(dataset: str, root: paths.Path) -> list[str]:
    """`name/config` (or `name:version`) of what is prepared of this data set."""
    name = re.split("[/:]", dataset)[0]
    versions = {
        file.parent.relative_to(root)
        for folders in ("*", "*/*")  # versions, or configs with versions
        for file in root.glob(f"{name}/{folders}/{_INFO_FILE}")
    }
    return sorted(f"{path.parent.as_posix()}:{path.name}" for path in versions)


def _draw_shapes(root: pathlib.Path) -> None:
    from simclr_jax.data.shapes import prepare_shapes

    try:
        prepare_shapes(root)
    except OSError as error:
        raise UserError(
            f"cannot write the shapes data set to {root} ({error.strerror or error}); "
            "set SIMCLR_JAX_CACHE to a folder with room"
        ) from error


def _shards(prepared: _Prepared, dataset: str, split: str) -> _Shards:
    """Of each file of the split."""
    info = prepared.builder.info
    try:
        instructions = info.splits[split].file_instructions
    except (KeyError, ValueError) as error:
        raise UserError(
            f"{dataset} has no split {split!r}; there are {', '.join(sorted(info.splits))}, "
            "and parts and sums of them such as train[:10%] or train+test"
        ) from error
    if sum(instruction.take for instruction in instructions) <= 0:
        raise UserError(f"{dataset}[{split}] holds no images; choose a larger part")
    shards = []
    for instruction in instructions:
        file = prepared.folder / pathlib.PurePath(instruction.filename).name
        try:
            size, changed = paths.size_and_time(file)
        except OSError as error:
            raise UserError(
                f"cannot read {file} ({error.strerror or error}); delete {file.parent} and run: "
                f"{prepared.command}"
            ) from error
        shards.append((file.name, size, changed, instruction.skip, instruction.take))
    return shards
