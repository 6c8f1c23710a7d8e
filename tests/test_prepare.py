import re
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from simclr_jax import prepare
from simclr_jax.data import shapes


class ToyFailing(tfds.core.GeneratorBasedBuilder):
    """Fails while it is prepared, as its `reason` says."""

    VERSION = tfds.core.Version("1.0.0")
    reason: Exception | None = None

    def _info(self):
        features = tfds.features.FeaturesDict({"label": tfds.features.ClassLabel(num_classes=2)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        if self.reason is not None:
            raise self.reason
        yield 0, {"label": 1}


@pytest.fixture
def toy(monkeypatch):
    """TFDS lists only its own data sets by name; this lists the toy with them."""
    monkeypatch.setattr(tfds, "list_builders", lambda **_: ["cifar10", "toy_failing"])
    return ToyFailing


def run(capsys, *arguments):
    status = prepare.main(arguments)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def last_line(text):
    return re.split(r"[\r\n]", text.rstrip("\n"))[-1]  # progress bars end with \r


def test_prepares_once_as_array_record(toy, tmp_path, capsys):
    status, out, _ = run(capsys, "toy_failing", "--data_dir", str(tmp_path))
    folder = tmp_path / "toy_failing/1.0.0"
    assert status == 0
    assert last_line(out) == f"toy_failing is prepared in {folder}"
    assert list(folder.glob("*.array_record-*"))
    again = run(capsys, "toy_failing", "--data_dir", str(tmp_path))
    assert again == (0, f"toy_failing is already prepared in {folder}\n", "")


def test_other_format_is_left_alone(toy, tmp_path, capsys):
    run(capsys, "toy_failing", "--data_dir", str(tmp_path))
    info = tmp_path / "toy_failing/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    status, out, err = run(capsys, "toy_failing", "--data_dir", str(tmp_path))
    assert (status, out) == (2, "")
    assert err == (
        f"error: toy_failing is prepared in {info.parent} as tfrecord; "
        "delete that folder or give another --data_dir\n"
    )


def test_missing_tensorflow(toy, tmp_path, capsys, monkeypatch):
    missing = ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")
    monkeypatch.setattr(toy, "reason", missing)
    status, _, err = run(capsys, "toy_failing", "--data_dir", str(tmp_path))
    assert status == 2
    assert last_line(err) == (
        "error: preparing toy_failing needs TensorFlow; run: pip install 'simclr_jax[prepare]'"
    )


def test_failure_is_one_line(toy, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(toy, "reason", ConnectionError("no route\nto host"))
    status, _, err = run(capsys, "toy_failing", "--data_dir", str(tmp_path))
    assert status == 2
    assert last_line(err).startswith(f"error: cannot prepare toy_failing in {tmp_path}: ")
    assert "no route to host" in last_line(err)


def test_unknown_name(tmp_path, capsys):
    status, out, err = run(capsys, "cifar11", "--data_dir", str(tmp_path))
    assert (status, out) == (2, "")
    assert err.startswith("error: there is no data set cifar11") and err.count("\n") == 1


def test_shapes_are_drawn_without_tensorflow(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shapes, "TRAIN_IMAGES", 10)
    monkeypatch.setattr(shapes, "TEST_IMAGES", 10)
    monkeypatch.setenv("SIMCLR_JAX_CACHE", str(tmp_path))
    expected = f"shapes is prepared in {tmp_path}/tfds/shapes/1.0.0\n"
    assert run(capsys, "shapes") == (0, expected, "")


def test_help_needs_no_tfds():
    code = (
        "import sys, simclr_jax.prepare as p\n"
        "try: p.main(['--help'])\n"
        "except SystemExit: sys.exit('tensorflow_datasets' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "--data_dir" in result.stdout
