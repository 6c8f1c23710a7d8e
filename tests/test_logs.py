import importlib.metadata
import json

import numpy as np
from PIL import Image

from simclr_jax import __version__, paths
from simclr_jax.logs import MetricsFile, RunLog, read_metrics, versions, write_json, write_projector


def test_going_on_drops_what_was_logged_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 10}\n{"step": 20}\n{"step": 3')
    metrics = MetricsFile(path, step=10)
    metrics.write({"step": 20, "loss": 1.0})
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 10, 20]
    assert [record["step"] for record in metrics.records] == [0, 10, 20]


def test_versions_are_told_where_this_package_is_not_installed(monkeypatch):
    """As on a machine without a network that runs a checkout."""
    installed = importlib.metadata.version

    def version(name):
        if name == "simclr_jax":
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions() == {"simclr_jax": __version__} | {n: installed(n) for n in ("jax", "flax", "optax")}


def test_json_is_moved_into_place(tmp_path):
    write_json(tmp_path / "result.json", {"steps": 3})
    assert json.loads((tmp_path / "result.json").read_text()) == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_metrics_are_read_up_to_half_a_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    metrics = MetricsFile(path, step=0)
    records = [{"step": 0, "epoch": 0.0}, {"step": 7, "epoch": 0.5, "loss": 1.25}]
    for record in records:
        metrics.write(record)
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 9, "lo')
    assert read_metrics(path) == records
    assert path.read_text().endswith('"lo')  # reading repairs nothing, as a run may be writing


def test_the_projector_has_embeddings_labels_and_thumbnails_and_replaces_those_before(tmp_path):
    rng = np.random.default_rng(0)
    folder = tmp_path / "projector"
    thumbnails = rng.integers(0, 256, (5, 4, 4, 3), np.uint8)
    labels = ["a", "b", "née", "a", "x y"]
    old = {"runs/old: trained h": rng.normal(size=(5, 3)).astype(np.float32)}
    new = {
        "runs/new: trained h": rng.normal(size=(5, 3)).astype(np.float32),
        "raw pixels": rng.normal(size=(5, 7)).astype(np.float32),
    }
    for embeddings in (old, new):
        write_projector(folder, embeddings, labels=labels, thumbnails=thumbnails)

    config = (folder / "projector_config.pbtxt").read_text()
    assert config.count("tensor_path") == len(new) and "old" not in config
    files = sorted(folder.rglob("tensors.tsv"))
    assert len(files) == len(new)
    for name, features in new.items():
        word = name.split()[-1]  # pixels, h
        file = next(file for file in files if file.parent.name.endswith(word))
        assert str(file.relative_to(folder)) in config
        np.testing.assert_array_equal(np.loadtxt(file, dtype=np.float32, delimiter="\t"), features)
        assert (file.parent / "metadata.tsv").read_text(encoding="utf-8").splitlines() == labels
        sprite = np.asarray(Image.open(file.parent / "sprite.png")).astype(int)
        first, last = sprite[:4, :4], sprite[4:8, 4:8]  # 5 images lie in rows of 3
        np.testing.assert_allclose(first, thumbnails[0], atol=1)
        np.testing.assert_allclose(last, thumbnails[4], atol=1)


def test_the_log_of_a_run_in_a_bucket_is_there_at_each_sync_and_goes_on(bucket):
    def steps():
        file = bucket / "run" / "metrics.jsonl"
        return [json.loads(line)["step"] for line in file.read_text().splitlines()]

    def tensorboard():
        return sum(file.stat().st_size for file in bucket.glob("run/events.out.tfevents.*"))

    workdir = paths.parse("gs://bucket/run")
    killed = RunLog(workdir, step=0, total_steps=9, steps_per_epoch=3)
    killed.metrics(0, {"images": 5})
    killed.image("views", np.zeros((4, 4, 3), np.uint8))
    killed.sync()
    assert steps() == [0]
    size = tensorboard()
    killed.metrics(3, {"loss": 1.0})
    killed.metrics(4, {"loss": 0.5})
    assert steps() == [0] and tensorboard() == size
    killed.sync()
    log = RunLog(workdir, step=3, total_steps=9, steps_per_epoch=3)
    assert [record["step"] for record in log.records] == [0, 3]
    log.metrics(4, {"loss": 0.25})
    log.close()
    assert steps() == [0, 3, 4]
    assert read_metrics(workdir / "metrics.jsonl")[-1] == {"step": 4, "epoch": 1.3333, "loss": 0.25}
    killed.close()
    assert tensorboard() > 2 * size > 0  # that of two runs, with a scalar each


def test_a_local_log_needs_no_copy(tmp_path):
    log = RunLog(tmp_path, step=0, total_steps=9, steps_per_epoch=3)
    log.metrics(0, {"images": 5})
    log.sync()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0]
    log.close()
    assert len(list(tmp_path.iterdir())) == 2
