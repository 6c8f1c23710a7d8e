"""The benchmark of memory: what does not fit is not run, what is slow is timed once, the file holds all."""

import functools
import json
import math
import os
import sys
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from simclr_jax import recipe, simclr
from simclr_jax.benchmark import memory, peak, timing
from simclr_jax.benchmark.__main__ import main
from simclr_jax.config import default_config
from simclr_jax.errors import UserError

pytestmark = [
    pytest.mark.usefixtures("kept_compilations"),
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # in ml_collections
]

RECIPE = """
from simclr_jax.config import default_config

def get_config():
    config = default_config()
    config.data.dataset = "cifar10"
    config.data.canvas_size = config.views.size = 32
    config.views.crop_area = (1.0, 1.0)
    config.views.jitter = config.views.grayscale = config.views.blur = 0.0
    config.train.batch_size = 64
    config.train.remat = True
    return config
"""


class Encoder(nnx.Module):
    """Little to compile, and maps that are large beside its parameters."""

    features = 8

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(3, 32, (3, 3), rngs=rngs)
        self.second = nnx.Conv(32, 8, (3, 3), strides=4, rngs=rngs)

    def __call__(self, images):
        return self.second(nnx.relu(self.first(images))).mean(axis=(1, 2))


def small_model(config):
    encoder: Any = Encoder()
    head = simclr.ProjectionHead(8, layers=1, hidden=0, out=8, norm="none", rngs=nnx.Rngs(0))
    return simclr.SimCLR(encoder, head)


def small_views(config, mesh):
    def make_views(keys, canvas, extent):
        return (jnp.concatenate([canvas, canvas[:, ::-1]]) / 255,)

    return make_views


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """What the command prints and writes with little to do, all in this process."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "recipe.py").write_text(RECIPE)
    said = []
    flags = [f"--config={folder / 'recipe.py'}", "--config.seed=3", f"--out={folder / 'figures.json'}"]
    flags += ["--views=256,2048", "--width=16", "--microbatches=4", "--memory_gb=0.04", "--repeats=2"]
    argv = ["benchmark", "memory", *flags]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak, "in_fresh_process", lambda function, *arguments: function(*arguments))
        patch.setattr(recipe, "build_model", small_model)
        patch.setattr(recipe, "build_views", small_views)
        patch.setattr(memory, "say", said.append)
        patch.setattr(sys, "argv", argv)  # where ml_collections looks for keys
        assert main(argv) == 0
    return "\n".join(said).splitlines(), json.loads((folder / "figures.json").read_text())


def test_the_tables_have_their_rows(tiny):
    lines, _ = tiny
    start = lines.index("NT-Xent and its gradient, float32, width 16")
    assert lines[start + 1].split()[:2] == ["views", "form"]
    rows = [line.split() for line in lines[start + 2 : start + 6]]
    assert [row[:2] for row in rows] == [
        *(["256", "plain"], ["256", "tiled"], ["2,048", "plain"], ["2,048", "tiled"])
    ]
    assert lines[start + 4].split()[3:] == "– – – – – not run: needs 0.051 GB of 0.040".split()
    start = lines.index("A training step of 64 images, views of 32 pixels, ResNet-18 of width 1")
    names = [line[2:16].strip() for line in lines[start + 2 :]]
    assert names == ["as it is", "4 microbatches", "views alone"]
    assert max(map(len, lines)) <= 110


def test_the_file_has_the_figures_and_where_they_are_from(tiny):
    _, figures = tiny
    assert figures["versions"]["jax"] == jax.__version__ and figures["date"]
    assert figures["hardware"]["cores"] == os.cpu_count()
    assert figures["config"]["seed"] == 3
    assert list(figures["loss"]) == ["256", "2048"]
    assert list(figures["step"]) == ["as it is", "4 microbatches", "views alone"]
    programs = [figures["loss"]["256"][form] for form in memory.FORMS] + list(figures["step"].values())
    for program in programs:
        numbers = [program["temporary_bytes"], program["times_slower"], *program["ms"].values()]
        assert all(map(math.isfinite, numbers)) and min(numbers) > 0
        assert program["needed_bytes"] > program["temporary_bytes"]
        assert program["runs"] == 2
        assert program["ms"]["least"] <= program["ms"]["median"] <= program["ms"]["most"]
        assert "seconds" not in program and "not_run" not in program
    plain, tiled = (figures["loss"]["256"][form] for form in memory.FORMS)
    assert plain["times_slower"] == 1
    assert tiled["times_slower"] == pytest.approx(tiled["ms"]["median"] / plain["ms"]["median"], rel=0.01)


def test_what_needs_more_memory_than_allowed_is_compiled_and_not_run(tiny):
    plain, tiled = (tiny[1]["loss"]["2048"][form] for form in memory.FORMS)
    assert plain["temporary_bytes"] > 40e6 > tiled["needed_bytes"]
    assert plain["not_run"] == "needs 0.051 GB of 0.040" and "ms" not in plain and "extra_bytes" not in plain
    assert tiled["runs"] == 2 and "times_slower" not in tiled


def test_microbatches_on_a_cpu_take_the_memory_of_one(tiny):
    """Without an order the compiler begins all of them at once, in the memory of the whole batch."""
    whole, parts = (tiny[1]["step"][name]["temporary_bytes"] for name in ("as it is", "4 microbatches"))
    assert parts < 0.75 * whole  # 0.58, and 0.99 without the order


def test_a_recipe_is_measured_in_microbatches_and_with_remat():
    config = default_config()
    config.train.batch_size = 12
    found = memory.variants(config, [2, 3])
    assert {name: (one.train.microbatch_size, one.train.remat) for name, one in found.items()} == {
        "as it is": (0, False),
        "2 microbatches": (6, False),
        "3 microbatches": (4, False),
        "remat": (0, True),
    }
    assert found["as it is"].model.batch_norm == "batch"
    assert found["3 microbatches"].model.batch_norm == "microbatch"


def temporary_bytes(rows, form):
    found: Any = memory.loss_work(rows, 16, form).program.memory_analysis()
    return found.temp_size_in_bytes


def test_tiled_takes_memory_linear_in_the_rows_and_plain_their_square():
    tiled = [temporary_bytes(rows, "tiled") for rows in (4096, 8192, 16384)]
    assert tiled[2] - tiled[1] == pytest.approx(2 * (tiled[1] - tiled[0]), rel=0.05)
    plain = [temporary_bytes(rows, "plain") for rows in (4096, 8192)]
    assert plain[1] == pytest.approx(4 * plain[0], rel=0.05)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux alone")
def test_the_peak_in_a_fresh_process_is_that_of_one_run():
    found = memory.try_apart(functools.partial(memory.loss_work, 2048, 16, "plain"), 1.0)
    assert found["seconds"] > 0
    # The runtime takes a few MB of its own at the first run.
    assert found["extra_bytes"] / 1e6 == pytest.approx(found["temporary_bytes"] / 1e6, abs=25)


@pytest.mark.parametrize("error", [MemoryError, BrokenProcessPool])
def test_a_process_that_gets_too_little_memory_is_not_the_end(monkeypatch, error):
    def killed(*arguments):
        raise error

    monkeypatch.setattr(peak, "in_fresh_process", killed)
    found = memory.try_apart(functools.partial(memory.loss_work, 8, 4, "plain"), 0)
    assert found == {"not_run": "its process got too little memory"}


def test_what_is_slow_is_timed_once_and_apart(monkeypatch):
    taken = {"quick": (2.0, 1.0, 6.0), "slow": ()}

    def in_turns(functions, repeats):
        for function in functions.values():
            function()
        return {name: timing.Times(taken[name][:repeats]) for name in functions}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    no_program: Any = None
    works = {
        "quick": lambda: memory.Work(no_program, lambda: lambda: None),
        "slow": lambda: pytest.fail("run once more"),
        "large": lambda: pytest.fail("run"),
    }
    tried = {"quick": {"seconds": 4.0}, "slow": {"seconds": 6.0}, "large": {"not_run": "too large"}}
    found = memory.timed(works, tried, repeats=3, seconds=11)
    quick, slow = found["quick"], found["slow"]
    assert quick == {"ms": {"median": 1500, "least": 1000, "most": 2000}, "runs": 2, "times_slower": 1}
    assert slow == {"ms": {"median": 6000, "least": 6000, "most": 6000}, "runs": 1, "times_slower": 4}
    assert found["large"] == {"not_run": "too large"}
    note = memory.loss_table(8, {"9": found}).rows
    assert [row[-1] for row in note] == ["", "timed once", "not run: too large"]


def test_free_memory_that_the_system_does_not_tell_is_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "none")
    with pytest.raises(UserError, match="--memory_gb"):
        memory.free_bytes()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(memory, "_MEMORY", tmp_path / "meminfo")
    assert memory.free_bytes() == 4000 * 1024 / 2


def test_a_bad_flag_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(memory, "try_apart", lambda *_: pytest.fail("nothing to run"))
    (tmp_path / "recipe.py").write_text(RECIPE)
    good = [
        "--views=8",
        "--width=4",
        "--microbatches=2",
        "--memory_gb=0",
        "--repeats=1",
        "--seconds=1",
        "--out=",
    ]
    bad = [
        "--views=",
        "--views=many",
        "--views=2",
        "--views=9",
        "--width=0",
        "--microbatches=1",
        "--microbatches=3",
        "--memory_gb=-1",
        "--repeats=0",
        "--seconds=-1",
        "--out=/no/folder/figures.json",
        "--config=/no/recipe.py",
        "--config.train.batch_size=1",
        "--config.train.batch=8",
    ]
    for flag in bad:
        argv = ["benchmark", "memory", f"--config={tmp_path / 'recipe.py'}", *good, flag]
        monkeypatch.setattr(sys, "argv", argv)
        assert main(argv) == 2, flag
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert flag.strip("-").partition("=")[0].rpartition(".")[2] in lines[0], lines
