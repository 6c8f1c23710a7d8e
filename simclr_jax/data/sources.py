"""Where encoded images come from: the protocol of a source, and prepared TFDS data sets."""

import dataclasses
import difflib
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from simclr_jax.errors import UserError

SHAPES = "shapes"
ARRAY_RECORD = "array_record"
UNLABELLED = -1

_INFO_FILE = "dataset_info.json"
_VERSION = re.compile(r"\d+\.\d+\.\d+")
# name[/config][:version], as TFDS writes it
_DATASET = re.compile(r"(?P<name>\w+)(/(?P<config>[\w.+-]+))?(:(?P<version>\d+\.\d+\.\d+))?")


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


def cache_dir() -> pathlib.Path:
    """The folder for what is made once and kept: `$SIMCLR_JAX_CACHE`, else the user's cache."""
    if own := os.environ.get("SIMCLR_JAX_CACHE"):
        return pathlib.Path(own).expanduser()
    if user_cache := os.environ.get("XDG_CACHE_HOME"):
        return pathlib.Path(user_cache).expanduser() / "simclr_jax"
    return pathlib.Path.home() / ".cache" / "simclr_jax"


def tfds_dir(dataset: str, data_dir: str | None = None) -> pathlib.Path:
    """The TFDS folder that holds `dataset`: `data_dir` or its default.

    The default is `$TFDS_DATA_DIR` or `~/tensorflow_datasets`, as in TFDS. `shapes`, which is drawn
    on first use, goes to the cache instead, as the folder of the others may be read-only.
    """
    if data_dir is not None:
        return pathlib.Path(data_dir).expanduser()
    if dataset == SHAPES:
        return cache_dir() / "tfds"
    return pathlib.Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


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
    shards = _shards(prepared.builder.info, dataset, split, prepared.command)
    return _TfdsSource(
        name=f"{dataset}[{split}]",
        class_names=prepared.class_names,
        fingerprint={
            "tfds": prepared.builder.info.full_name,
            "keys": [prepared.image_key, label_key],
            "shards": shards,
        },
        records=prepared.read(split),
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


def _prepared(dataset: str, data_dir: str | None) -> _Prepared:
    import tensorflow_datasets as tfds

    root = tfds_dir(dataset, data_dir)
    command = f"python -m simclr_jax.prepare {dataset}"
    if data_dir is not None:
        command += f" --data_dir {data_dir}"
    if dataset == SHAPES:
        _draw_shapes(root)
    folder = prepared_folder(dataset, root)
    if folder is None:
        there = ", ".join(_prepared_names(dataset, root))
        raise UserError(
            f"{dataset} is not prepared in {root}"
            f"{f' (prepared there: {there})' if there else ''}; run: {command}"
        )
    builder: Any = tfds.builder_from_directory(folder)
    info = builder.info
    formats = {file_format.value for file_format in info.available_file_formats()}
    if ARRAY_RECORD not in formats:
        raise UserError(
            f"{dataset} is prepared in {folder} as {', '.join(sorted(formats))}, which cannot be read "
            f"without TensorFlow; delete that folder or choose another data_dir, then run: {command}"
        )
    info.set_file_format(ARRAY_RECORD, override=True, override_if_initialized=True)

    features: Mapping[str, Any] = dict(info.features)
    images = [key for key, kind in features.items() if isinstance(kind, tfds.features.Image)]
    labels = [key for key, kind in features.items() if isinstance(kind, tfds.features.ClassLabel)]
    if not images:
        raise UserError(
            f"{dataset} has no image among its features ({', '.join(features)}); choose an image data set"
        )
    return _Prepared(builder, images[0], labels[0] if labels else None, command)


def prepared_folder(dataset: str, root: pathlib.Path) -> pathlib.Path | None:
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
    elif not (root / name).is_dir():
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


def _prepared_names(dataset: str, root: pathlib.Path) -> list[str]:
    """`name/config` (or `name:version`) of what is prepared of this data set."""
    name = re.split("[/:]", dataset)[0]
    versions = {file.parent.relative_to(root) for file in root.glob(f"{name}/**/{_INFO_FILE}")}
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


def _shards(info: Any, dataset: str, split: str, command: str) -> list[tuple[str, int, int, int, int]]:
    """Name, bytes, time of change, first record and number of records of each file of the split."""
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
        file = pathlib.Path(instruction.filename)
        try:
            status = file.stat()
        except OSError as error:
            raise UserError(
                f"cannot read {file} ({error.strerror}); delete {file.parent} and run: {command}"
            ) from error
        shards.append((file.name, status.st_size, status.st_mtime_ns, instruction.skip, instruction.take))
    return shards
