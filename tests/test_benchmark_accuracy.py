"""Minutes to an accuracy: what ends a run, what is counted, what is said."""

import contextlib
import json
import subprocess
import sys
import types
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from simclr_jax.benchmark import accuracy, recipes, timing
from simclr_jax.benchmark.__main__ import main
from simclr_jax.config import default_config
from simclr_jax.interrupt import StopRequest

pytestmark = [
    pytest.mark.usefixtures("kept_compilations"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # ml_collections calls it
]

RECIPE = """
from simclr_jax.config import default_config

def get_config():
    config = default_config()
    config.data.update({"dataset": "shapes", "split": "train[:64]", "canvas_size": 16})
    config.views.size = 16
    config.model.update({"depth": 10, "width": 0.125})
    config.train.update({"batch_size": 16, "epochs": 4})
    config.evaluation.update({"dataset": "shapes", "bank_split": "train[:100]", "query_split": "test[:16]"})
    return config
"""


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Runs the command; what is kept between runs of the tests is used, to be quick."""
    (tmp_path / "recipe.py").write_text(RECIPE)
    monkeypatch.setattr(timing, "no_kept_compilations", contextlib.nullcontext)
    monkeypatch.setattr(accuracy, "_no_kept_images", contextlib.nullcontext)

    def run(*flags):
        good = ["--target=90", "--metric=knn", "--k=10", "--every=1", "--workdir=", "--out="]
        argv = ["benchmark", "accuracy", f"--config={tmp_path / 'recipe.py'}", *good, *flags]
        monkeypatch.setattr(sys, "argv", argv)
        return main(argv)

    return run


def test_the_target_ends_the_run_which_is_kept(measure, tmp_path, capsys):
    workdir, out = tmp_path / "run", tmp_path / "figures.json"
    assert measure("--target=0", "--k=3", "--every=2", f"--workdir={workdir}", f"--out={out}") == 0
    found = json.loads(out.read_text())
    assert found["reached"] and found["metric"] == "knn3_accuracy"
    (point,) = found["points"]
    assert point["epoch"] == 2 and point["minutes"] == found["minutes"]
    assert 0 < found["evaluation_minutes"] < found["minutes"]
    assert 0 < found["compile_minutes"] < found["minutes"]
    assert found["config"]["evaluation"]["k"] == 3
    (step,) = [path.name for path in (workdir / "checkpoints").iterdir() if path.name.isdigit()]
    assert step == "8" and not (workdir / "result.json").exists()
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("0.0% reached: ") and "after 2 epochs and" in last
    assert f"{point['accuracy']:.2%} at the last evaluation" in last
    assert "A100" not in last  # that was CIFAR-10


def test_without_the_target_it_goes_to_the_end(measure, tmp_path, capsys):
    out = tmp_path / "figures.json"
    assert measure("--target=100", "--metric=knn1", "--every=3", f"--out={out}") == 0
    found = json.loads(out.read_text())
    assert [point["epoch"] for point in found["points"]] == [3, 4]
    assert not found["reached"] and found["metric"] == "knn1_accuracy"
    assert found["minutes"] == found["points"][-1]["minutes"] > found["points"][0]["minutes"]
    said = capsys.readouterr().out
    assert "100.0% not reached: " in said.splitlines()[-1]
    header, *rows = said.splitlines()[-5:-2]
    assert header.split() == ["epoch", "minutes", "1-NN", "accuracy"]
    assert [row.split()[0] for row in rows] == ["3", "4"]


def test_the_evaluation_of_before_is_evaluation_and_a_stop_is_told(tmp_path, monkeypatch):
    """A run that is asked to stop before its first step has evaluated the untrained encoder."""

    def run(settings, workdir, stop, stage, open_stage):
        opened = open_stage(settings, True)
        opened.before("state")
        return None

    seconds = iter(range(0, 1000, 60))
    monkeypatch.setattr(accuracy, "time", types.SimpleNamespace(perf_counter=lambda: next(seconds)))
    monkeypatch.setattr(accuracy.session, "run", run)
    images: Any = [0] * 20
    model: Any = None
    stage = accuracy.session.Stage(images, model, lambda state: {}, lambda state: {}, {"knn1_data": "x"})
    monkeypatch.setattr(accuracy.train, "open_stage", lambda settings, fresh: stage)
    settings = default_config()
    settings.train.batch_size = 10
    found = accuracy.time_to(settings, tmp_path, StopRequest(), name="knn1_accuracy", target=0.5)
    assert found == ([], 3, 1, 0, "x, cosine distance")
    assert "stopped before the first evaluation, after 3.00 minutes" in accuracy.verdict(found, 0.5)


def test_an_accuracy_that_is_the_target_reaches_it():
    assert accuracy._reaches(0.123, 12.3 / 100) and 0.123 != 12.3 / 100
    assert not accuracy._reaches(0.1229, 12.3 / 100)


def test_compilation_is_timed():
    seconds = []
    with timing.no_kept_compilations(), accuracy._noting_compilation(seconds):
        jax.jit(lambda x: jnp.tanh(x) * 1.2345)(jnp.ones(7)).block_until_ready()
    assert seconds and sum(seconds) > 0
    counted = len(seconds)
    jax.jit(lambda x: jnp.tanh(x) * 2.3456)(jnp.ones(7)).block_until_ready()
    assert len(seconds) == counted


BAD = {
    "--target=101": "target",
    "--metric=knn2": "metric",
    "--k=0": "--k",
    "--k=200": "has 100 images",
    "--every=0": "every",
    "--out=/no/folder/figures.json": "--out",
    "--config=/no/recipe.py": "/no/recipe.py",
    "--config.train.batch_size=1": "config.train.batch_size",
    "--config.train.batch=8": "batch",
}


@pytest.mark.parametrize("flag", BAD)
def test_a_bad_flag_is_one_line(measure, flag, capsys):
    assert measure(flag) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "packing" not in line)
    assert line.startswith("error: ") and BAD[flag] in line


def test_a_folder_with_a_run_is_refused(measure, tmp_path, capsys):
    assert measure(f"--workdir={tmp_path}") == 2
    assert "name a new folder" in capsys.readouterr().err


def test_a_recipe_of_the_checkout_is_named_where_none_is():
    completed = recipes.with_default(["benchmark", "--config.seed=1"], "cifar10.py")
    assert completed == ["benchmark", f"--config={recipes.FOLDER / 'cifar10.py'}", "--config.seed=1"]
    named = ["benchmark", "--config", "mine.py"]
    assert recipes.with_default(named, "cifar10.py") == named
    assert recipes.with_default(["benchmark"], "nowhere.py") == ["benchmark"]


@pytest.mark.parametrize("name", ["accuracy", "memory"])
def test_keys_can_be_set_of_the_recipe_that_nobody_named(name):
    done = subprocess.run(
        [sys.executable, "-m", "simclr_jax.benchmark", name, "--config.train.batch_size=1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: config.train.batch_size is 1")
