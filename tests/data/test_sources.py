import concurrent.futures
import io
import json
import os
import shutil
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds
from PIL import Image

from simclr_jax.data.decode import decode_rgb
from simclr_jax.data.sources import cache_dir, describe_tfds, local_cache_dir, tfds_dir, tfds_source
from simclr_jax.errors import UserError
from simclr_jax.prepare import prepare


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    file.seek(0)
    return file


class ToyStl(tfds.core.GeneratorBasedBuilder):
    """As TFDS's stl10: a split without labels, whose label is -1."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(4, 4, 3), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=["plane", "bird"]),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {name: self._generate_examples(name) for name in ("train", "test", "unlabelled")}

    def _generate_examples(self, split):
        for index in range(10):
            label = -1 if split == "unlabelled" else index % 2
            yield index, {"id": f"{split}{index}", "image": png(10 * index), "label": label}


class ToyText(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        yield 0, {"text": "word"}


def prepared(builder_class, folder):
    builder_class(data_dir=folder).download_and_prepare(file_format="array_record")
    return str(folder)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    prepared(ToyStl, folder)
    return prepared(ToyText, folder)


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_labelled_split(toys):
    source = tfds_source("toy_stl", "train", data_dir=toys)
    assert len(source) == 10
    assert source.name == "toy_stl[train]"
    assert source.class_names == ("plane", "bird")
    assert source.describe(7) == "toy_stl[train] record 7"
    for index in range(10):
        data, label = source.record(index)
        value = decode_rgb(data, size=4)[0, 0, 0]
        assert label == value // 10 % 2


def test_unlabelled_split(toys):
    source = tfds_source("toy_stl", "unlabelled", data_dir=toys)
    assert [source.record(index)[1] for index in range(len(source))] == [-1] * 10


@pytest.mark.parametrize(("split", "count"), [("train+test", 20), ("train[:30%]", 3), ("all", 30)])
def test_parts_and_sums_of_splits(toys, split, count):
    assert len(tfds_source("toy_stl", split, data_dir=toys)) == count


def test_default_folder(toys, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", toys)
    assert len(tfds_source("toy_stl:1.0.0", "train")) == 10


def test_fingerprint_tells_splits_and_preparations_apart(toys, tmp_path):
    fingerprints = [
        tfds_source("toy_stl", split, data_dir=toys).fingerprint
        for split in ("train", "train", "test", "train+test", "train[:5]", "train[5:]")
    ]
    texts = [json.dumps(fingerprint, sort_keys=True) for fingerprint in fingerprints]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 5
    again = tfds_source("toy_stl", "train", data_dir=prepared(ToyStl, tmp_path))
    assert json.dumps(again.fingerprint, sort_keys=True) != texts[0]


def test_threads_read_what_one_thread_reads(toys):
    source = tfds_source("toy_stl", "all", data_dir=toys)
    alone = [source.record(index) for index in range(30)]
    source = tfds_source("toy_stl", "all", data_dir=toys)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(source.record, list(range(30)) * 20))
    assert together == alone * 20


def test_unknown_data_set(tmp_path):
    with pytest.raises(UserError, match=r"there is no data set cifar11 .*did you mean .*cifar10") as caught:
        tfds_source("cifar11", "train", data_dir=str(tmp_path))
    one_line(caught)


def test_unknown_config(tmp_path):
    with pytest.raises(UserError, match="no config 320px-v3; did you mean 320px-v2"):
        tfds_source("imagenette/320px-v3", "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["", "a b", "../cifar10", "cifar10:latest"])
def test_malformed_name(name, tmp_path):
    with pytest.raises(UserError, match="is no data set name"):
        tfds_source(name, "train", data_dir=str(tmp_path))


@pytest.mark.parametrize("dataset", ["cifar10", "stl10", "imagenette", "imagenette/320px-v2"])
def test_not_prepared_names_folder_and_command_and_writes_nothing(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    with pytest.raises(UserError) as caught:
        tfds_source(dataset, "train")
    assert one_line(caught) == (
        f"{dataset} is not prepared in {tmp_path}/tfds; run: python -m simclr_jax.prepare {dataset}"
    )
    assert not list(tmp_path.iterdir())


def test_command_repeats_the_folder_that_was_given(tmp_path):
    with pytest.raises(UserError, match=f"prepare cifar10 --data_dir {tmp_path}$"):
        tfds_source("cifar10", "train", data_dir=str(tmp_path))


def test_not_prepared_mentions_the_configs_that_are(tmp_path):
    folder = tmp_path / "imagenette/320px-v2/1.0.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{}")
    with pytest.raises(UserError, match=r"prepared there: imagenette/320px-v2:1.0.0"):
        tfds_source("imagenette", "train", data_dir=str(tmp_path))


def test_other_format(tmp_path):
    prepared(ToyStl, tmp_path)
    info = tmp_path / "toy_stl/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(
        UserError, match=r"as tfrecord.* delete that folder .*simclr_jax\.prepare toy_stl"
    ) as caught:
        tfds_source("toy_stl", "train", data_dir=str(tmp_path))
    one_line(caught)


@pytest.mark.parametrize("split", ["trian", "train[", "", "train[::2]", "train[50:60]"])
def test_unknown_or_malformed_split(toys, split):
    with pytest.raises(UserError, match="there are test, train, unlabelled") as caught:
        tfds_source("toy_stl", split, data_dir=toys)
    one_line(caught)


@pytest.mark.parametrize("split", ["train[:0]", "train[5:3]"])
def test_empty_split(toys, split):
    with pytest.raises(UserError, match="holds no images"):
        tfds_source("toy_stl", split, data_dir=toys)


def test_data_set_without_images(toys):
    with pytest.raises(UserError, match=r"toy_text has no image among its features \(text\)"):
        tfds_source("toy_text", "train", data_dir=toys)


def test_missing_shard(tmp_path):
    prepared(ToyStl, tmp_path)
    next(tmp_path.glob("toy_stl/1.0.0/*train*")).unlink()
    with pytest.raises(UserError, match=r"cannot read .*toy_stl-train"):
        tfds_source("toy_stl", "train", data_dir=str(tmp_path))


def test_damaged_shard_is_an_os_error(tmp_path):
    prepared(ToyStl, tmp_path)
    source = tfds_source("toy_stl", "train", data_dir=str(tmp_path))
    shard = next(tmp_path.glob("toy_stl/1.0.0/*train*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    with pytest.raises(OSError, match="damaged record"):
        source.record(0)


def test_reading_imports_no_framework(toys):
    code = (
        "import sys; import simclr_jax.data.pack; from simclr_jax.data.sources import tfds_source;"
        f"tfds_source('toy_stl', 'train', data_dir={toys!r}).record(0);"
        "sys.exit(bool({'tensorflow', 'torch', 'jax'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_data_set_describes_itself(toys):
    described = describe_tfds("toy_stl", data_dir=toys)
    assert described == (("test", "train", "unlabelled"), ("plane", "bird"), 4)


@pytest.mark.parametrize(
    ("dataset", "split", "count"),
    [("cifar10", "test", 10_000), ("imagenette/320px-v2", "validation", 3_925)],
)
def test_real_data_sets(dataset, split, count):
    root = os.environ.get("TFDS_DATA_DIR")
    if not root or not os.path.isdir(os.path.join(root, dataset)):
        pytest.skip(f"{dataset} is not prepared in TFDS_DATA_DIR")
    source = tfds_source(dataset, split)
    assert len(source) == count
    data, label = source.record(17)
    assert decode_rgb(data, size=32).ndim == 3
    assert 0 <= label < 10


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("SIMCLR_JAX_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert str(cache_dir()) == "/home/someone/.cache/simclr_jax"
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_dir()) == "/xdg/simclr_jax"
    monkeypatch.setenv("SIMCLR_JAX_CACHE", "~/own")
    assert str(cache_dir()) == "/home/someone/own"


def test_tfds_dir(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    assert str(tfds_dir("cifar10")) == "/home/someone/tensorflow_datasets"
    monkeypatch.setenv("TFDS_DATA_DIR", "/data")
    assert str(tfds_dir("cifar10")) == "/data"
    assert str(tfds_dir("cifar10", "/given")) == "/given"


@pytest.fixture
def remote_toys(toys, bucket):
    shutil.copytree(toys, bucket / "tfds")
    return bucket / "tfds"


def shards(tmp_path):
    return sorted(file.name for file in (tmp_path / "xdg").rglob("*.array_record*"))


def test_a_data_set_in_a_bucket_gives_the_records_of_a_local_one(toys, remote_toys, monkeypatch, tmp_path):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", "gs://bucket/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    ours = tfds_source("toy_stl", "train[2:]", data_dir="gs://bucket/tfds")
    local = tfds_source("toy_stl", "train[2:]", data_dir=toys)
    again = tfds_source("toy_stl", "train[2:]", data_dir="gs://bucket/tfds")
    assert (len(ours), ours.name, ours.class_names) == (len(local), local.name, local.class_names)
    assert ours.fingerprint == again.fingerprint
    assert shards(tmp_path) == []  # where its pack is cached, nothing is copied
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        records = list(pool.map(ours.record, range(8)))
    assert records == [local.record(index) for index in range(8)]
    assert shards(tmp_path) == ["toy_stl-train.array_record-00000-of-00001"]
    for file in remote_toys.rglob("*.array_record*"):
        file.unlink()
    assert again.record(3) == records[3]  # from the shards that are there by now


def test_a_data_set_in_a_bucket_that_is_not_prepared_or_cannot_be_read(remote_toys):
    with pytest.raises(UserError) as caught:
        tfds_source("toy_stl:2.0.0", "train", data_dir="gs://bucket/tfds")
    message = one_line(caught)
    assert "toy_stl:2.0.0 is not prepared in gs://bucket/tfds (prepared there: toy_stl:1.0.0)" in message
    assert "--data_dir tfds && gcloud storage cp -r tfds/toy_stl gs://bucket/tfds/" in message
    source = tfds_source("toy_stl", "train", data_dir="gs://bucket/tfds")
    for file in remote_toys.rglob("*.array_record*"):
        file.unlink()
    with pytest.raises(UserError, match=r"cannot copy from gs://bucket/tfds/toy_stl/1\.0\.0/toy_stl-train"):
        source.record(0)


def test_shapes_are_drawn_on_a_disk_where_the_cache_is_remote(bucket, monkeypatch):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", "gs://bucket/cache")
    assert str(cache_dir()) == "gs://bucket/cache"
    assert tfds_dir("shapes") == local_cache_dir() / "tfds"
    assert str(tfds_dir("cifar10", "gs://bucket/tfds")) == "gs://bucket/tfds"
    with pytest.raises(UserError, match=r"TFDS cannot write to gs://bucket/tfds; run: python -m"):
        prepare("shapes", "gs://bucket/tfds")
