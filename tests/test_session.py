"""What `session.run` does besides training: dry runs, and too little memory."""

import jax
import pytest

from simclr_jax import train, training
from simclr_jax.config import default_config
from simclr_jax.data.batches import ResidentBatches
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest

pytestmark = pytest.mark.usefixtures("kept_compilations")


def tiny(**changes):
    settings = default_config()
    settings.data.update({"dataset": "shapes", "split": "train[:64]", "canvas_size": 16})
    settings.views.size = 16
    settings.model.update({"depth": 10, "width": 0.125})
    settings.train.update({"batch_size": 16, "steps": 2})
    settings.evaluation.update({"dataset": "shapes", "bank_split": "train[:100]", "query_split": "test[:16]"})
    settings.update_from_flattened_dict(changes)
    return settings


def test_a_dry_run_tells_what_a_step_takes_and_leaves_nothing(tmp_path, capsys):
    workdir = tmp_path / "run"
    assert train.train(tiny(), workdir, StopRequest(), dry_run=True) is None
    assert not workdir.exists()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split("  ")[1]: line.split() for line in lines if line.startswith("  ")}
    assert {"views", "encoder", "head", "loss", "gradient", "in all"} <= rows.keys()
    assert {"weights and optimizer", "images", "work"} <= rows.keys()
    parameters = [int(rows[name][-2].replace(",", "")) for name in ("encoder", "head")]
    assert f"{sum(parameters):,} parameters" in "\n".join(lines)


def test_a_dry_run_looks_at_nothing_of_the_folder(tmp_path, capsys):
    (tmp_path / "another.txt").touch()
    assert train.train(tiny(), tmp_path, StopRequest(), dry_run=True) is None
    assert [path.name for path in tmp_path.iterdir()] == ["another.txt"]


def refuse(*args, **kwargs):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99999999999 bytes.")


def test_a_step_too_large_is_one_line_with_what_to_change(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "make_run_steps", lambda *args: refuse)
    with pytest.raises(UserError) as raised:
        train.train(tiny(), tmp_path / "run", StopRequest())
    said = str(raised.value)
    assert "\n" not in said and "a batch of 16 images with views of 16 pixels" in said
    assert "train.microbatch_size=" in said and "model.dtype=bfloat16" in said and "train.remat=True" in said


def test_images_too_large_for_the_device_are_to_be_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(ResidentBatches, "__init__", refuse)
    with pytest.raises(UserError, match=r"run\.memory_gb lower"):
        train.train(tiny(), tmp_path / "run", StopRequest())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train.microbatch_size": 5}, "not a multiple of config.train.microbatch_size=5"),
        ({"train.microbatch_size": 4}, "batch_norm=microbatch"),
        ({"train.microbatch_size": 2, "model.batch_norm": "microbatch"}, "not a multiple of the 4 devices"),
        ({"model.batch_norm": "running"}, "config.start.run"),
        ({"loss.name": "dcl2"}, "'nt_xent', 'dcl', 'dclw'"),
    ],
)
def test_microbatches_that_cannot_be_are_one_line(changes, said, tmp_path):
    with pytest.raises(UserError, match="config") as raised:
        train.train(tiny(**changes), tmp_path / "run", StopRequest())
    assert said in str(raised.value) and "\n" not in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_a_run_in_microbatches_with_another_loss_learns_and_goes_on(tmp_path):
    changes = {"train.microbatch_size": 8, "model.batch_norm": "microbatch", "loss.name": "dclw"}
    result = train.train(tiny(**changes, **{"train.remat": True}), tmp_path / "run", StopRequest())
    assert result is not None and result["steps"] == 2
