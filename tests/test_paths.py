import itertools
import json
import os
import pathlib

import fsspec
import jax
import numpy as np
import pytest
from fsspec.registry import _registry, known_implementations

from simclr_jax import ablate, checkpoints, command, paths, torchvision_weights, train
from simclr_jax.config import default_config
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest


def test_local_text_is_a_local_path_with_home_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    for text, expected in {
        "~/x": "/home/someone/x",
        "a/../b": "a/../b",
        "/a": "/a",
        "gs:/a": "gs:/a",
    }.items():
        path = paths.parse(text)
        assert path == pathlib.Path(expected) and not paths.is_remote(path)
    assert paths.absolute(paths.parse("a")) == pathlib.Path.cwd() / "a"


@pytest.mark.parametrize(("cache", "of_xla"), [("/cache", "as before"), ("gs://bucket/cache", "none")])
def test_compilations_are_kept_remotely_without_what_only_a_disk_can_hold(bucket, monkeypatch, cache, of_xla):
    monkeypatch.setenv("SIMCLR_JAX_CACHE", cache)
    named = ("jax_compilation_cache_dir", "jax_persistent_cache_enable_xla_caches")
    before = [jax.config.values[name] for name in named]
    try:
        for name, value in zip(named, (None, "as before"), strict=True):
            jax.config.update(name, value)
        command._keep_compilations()
        assert [jax.config.values[name] for name in named] == [f"{cache}/xla", of_xla]
    finally:
        for name, value in zip(named, before, strict=True):
            jax.config.update(name, value)


def test_a_remote_path_keeps_its_address(bucket):
    path = paths.parse("gs://bucket/runs/~x")
    assert paths.is_remote(path)
    assert str(path) == str(paths.absolute(path)) == "gs://bucket/runs/~x"
    assert str(path / "a") == "gs://bucket/runs/~x/a"
    assert [part.name for part in (path, path.parent)] == ["~x", "runs"]


@pytest.mark.parametrize("text", ["s3://bucket/x", "https://example.com/x", "file:///x"])
def test_other_schemes_are_refused(text):
    with pytest.raises(UserError, match=r"cannot use .*; name a local path or a gs:// one"):
        paths.parse(text)


def test_without_gcsfs_one_line_says_what_to_install(bucket, monkeypatch):
    monkeypatch.delitem(_registry, "gs")
    monkeypatch.setitem(known_implementations, "gs", {"class": "no_such_module.Storage", "err": ""})
    with pytest.raises(UserError, match=r"^gs://bucket needs gcsfs; run: pip install gcsfs$"):
        paths.parse("gs://bucket/runs/a")


def test_a_bucket_that_cannot_be_reached_is_told_in_one_line(bucket, monkeypatch):
    with pytest.raises(UserError, match=r"^there is no bucket gs://buckte, or you may not see it$"):
        paths.parse("gs://buckte/runs/a")

    def refuse(self, path, **options):
        raise RuntimeError("Anonymous caller\ndoes not have storage.objects.get access, 401")

    monkeypatch.setattr(fsspec.get_filesystem_class("gs"), "exists", refuse)
    with pytest.raises(UserError, match=r"cannot reach gs://bucket \(Anonymous .* 401\).*gcloud") as raised:
        paths.parse("gs://bucket/runs/a")
    assert "\n" not in str(raised.value)


def test_writing_is_whole_or_not_at_all(bucket, tmp_path, monkeypatch):
    for path, folder in ((tmp_path / "a", tmp_path), (paths.parse("gs://bucket/new/a"), bucket / "new")):
        for text in (b"first", b"second"):
            paths.write(path, text)
            assert (folder / "a").read_bytes() == path.read_bytes() == text
        assert [file.name for file in folder.iterdir() if file.is_file()] == ["a"]

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        paths.write(tmp_path / "a", b"third")
    assert (tmp_path / "a").read_bytes() == b"second"


def test_what_remote_storage_raises_is_one_line(bucket, monkeypatch):
    def fail(self, path, mode, **options):
        raise RuntimeError("reset\nby peer")

    monkeypatch.setattr(fsspec.get_filesystem_class("gs"), "open", fail)
    with pytest.raises(UserError, match=r"^cannot write gs://bucket/a \(reset by peer\); put it right"):
        paths.write(paths.parse("gs://bucket/a"), b"")


def test_files_and_folders_are_copied_there_and_back(bucket, tmp_path):
    source = tmp_path / "source"
    for name in ("a", "b/c", "b/d/e"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    remote = paths.parse("gs://bucket/x")
    for _ in range(2):  # over what is there
        paths.copy(source, remote)
    paths.copy(remote / "b", tmp_path / "back")
    paths.copy(remote / "a", tmp_path / "other" / "a")
    assert {str(file.relative_to(bucket)) for file in bucket.rglob("*") if file.is_file()} == {
        "x/a",
        "x/b/c",
        "x/b/d/e",
    }
    assert (tmp_path / "back" / "d" / "e").read_text() == "b/d/e"
    assert (tmp_path / "other" / "a").read_text() == "a"
    with pytest.raises(UserError, match="cannot copy from gs://bucket/none"):
        paths.copy(paths.parse("gs://bucket/none"), tmp_path / "none")


def test_what_is_written_locally_lands_in_either_place(bucket, tmp_path):
    for path, place in ((tmp_path / "page", tmp_path / "page"), (paths.parse("gs://bucket/p"), bucket / "p")):
        with paths.local(path) as folder:
            folder.mkdir()
            (folder / "index.html").write_text("x")
        assert (place / "index.html").read_text() == "x"


def test_a_folder_is_replaced_once_the_new_one_is_whole(tmp_path):
    folder = tmp_path / "a"
    for text in ("first", "second"):
        with paths.whole_folder(folder) as partial:
            (partial / text).write_text(text)
            assert not (folder / text).exists()
        assert [file.name for file in folder.iterdir()] == [text]
    with pytest.raises(KeyError), paths.whole_folder(folder) as partial:
        (partial / "third").touch()
        raise KeyError
    assert [str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*")] == ["a", "a/second"]


def test_weights_and_cells_are_written_to_a_bucket_and_read_from_it(bucket):
    weights, cells = (
        paths.parse("gs://bucket/out/w.safetensors"),
        paths.parse("gs://bucket/study/ablation.csv"),
    )
    tensors = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.ones(1, np.float32)}
    torchvision_weights.write(weights, tensors, {"depth": "18"})
    found = torchvision_weights.read(weights)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor)
    assert ablate.read_cells(cells) == {}
    ablate.write_cells(cells, {("crop", "blur"): 0.25}, steps=3)
    assert ablate.read_cells(cells) == {("crop", "blur"): 0.25}
    with pytest.raises(UserError, match="cannot copy from gs://bucket/none"):
        torchvision_weights.read(paths.parse("gs://bucket/none"))


def tiny_config():
    settings = default_config()
    settings.data.update(dataset="shapes", split="train[:200]", canvas_size=32)
    settings.views.update(size=16, flip=0.0, jitter=0.0, grayscale=0.0, blur=0.0)
    settings.views.update(crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
    settings.model.update(depth=10, width=0.125, head_hidden=16, head_out=8)
    settings.optimizer.update(learning_rate=0.05, scaling="none", final_fraction=1.0)
    settings.train.update(steps=6, batch_size=20)
    settings.evaluation.update(dataset="shapes", bank_split="train[:200]", query_split="test[:60]")
    settings.evaluation.batch_size = 64
    settings.run.update(log_every_steps=1, checkpoint_minutes=0.0)
    return settings


class StopAt(StopRequest):
    """Set at the `number`th look."""

    def __init__(self, number):
        super().__init__()
        self._looks = itertools.count(1)
        self._number = number

    def __bool__(self):
        return next(self._looks) >= self._number


def test_a_run_in_a_bucket_goes_on_after_a_stop_with_its_log_complete(bucket, monkeypatch, kept_compilations):
    # TensorStore reads gs:// by its own client, so the checkpoints of this run are written to the folder
    # behind the bucket, and everything else through it.
    def behind(path):
        return str(path).replace("gs://bucket", str(bucket))

    monkeypatch.setattr(checkpoints.paths, "absolute", lambda path: pathlib.Path(behind(path)))
    workdir = paths.parse("gs://bucket/runs/tiny")
    place = bucket / "runs" / "tiny"
    settings = tiny_config()

    assert train.train(settings, workdir, StopAt(3)) is None
    lines = (place / "metrics.jsonl").read_text().splitlines()
    reached = json.loads(lines[-1])["step"]
    assert 0 < reached < 6
    assert checkpoints.finished_steps(workdir / "checkpoints")[-1] == reached

    result = train.train(settings, workdir, StopRequest())
    assert result is not None and result == json.loads((place / "result.json").read_text())
    records = [json.loads(line) for line in (place / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, *range(1, 7), 6]
    assert records[: len(lines)] == [json.loads(line) for line in lines]
    assert all(np.isfinite(record["loss"]) for record in records[1:-1])
    assert len(list(place.glob("events.out.tfevents.*"))) == 2
    assert train.train(settings, workdir, StopRequest()) == result
