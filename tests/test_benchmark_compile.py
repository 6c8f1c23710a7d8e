import json
import sys

import jax
import pytest

from simclr_jax import command, config
from simclr_jax.benchmark import compile as benchmark_compile
from simclr_jax.benchmark import recipes, tpu
from simclr_jax.table import table_text

pytestmark = [
    pytest.mark.usefixtures("kept_compilations"),
    pytest.mark.filterwarnings("ignore:the load_module"),  # of ml_collections, with which it reads a recipe
]

GIB = 2**30


def small(**changes):
    settings = config.default_config()
    settings.data.dataset = "shapes"
    settings.data.canvas_size = settings.views.size = 16
    settings.model.depth, settings.model.width = 10, 0.125
    settings.train.batch_size = 8
    settings.update_from_flattened_dict(changes)
    config.check(settings)
    return settings


def run(monkeypatch, arguments):
    monkeypatch.setattr(sys, "argv", arguments)  # where ml_collections looks for the keys that are set
    return command.run(benchmark_compile.main, arguments, usage="", flag_values=benchmark_compile.FLAGS)


@pytest.mark.parametrize(("memory_gb", "share"), [(4.0, 1), (50_000 / 1e9, 2), (1e-6, 0)])
def test_the_step_is_compiled_without_arrays_wherever_the_images_lie(memory_gb, share):
    """The devices of this machine stand for chips."""
    settings = small(**{"run.memory_gb": memory_gb})
    found = benchmark_compile.compile_step(settings, 101, jax.devices()[:2])
    assert found["chips"] == 2 and found["batch_size"] == found["microbatch_size"] == 8
    pack = 101 * 16 * 16 * 3
    images = {1: pack, 2: (pack + 768) // 2, 0: 4 * 16 * 16 * 3}[share]
    small_arrays = 64 * 8 * 4 + 101 * 12 + 1000
    assert images <= found["data_bytes"] <= images + small_arrays
    assert found["state_bytes"] > 0 and found["work_bytes"] > 0
    assert found["total_bytes"] == sum(found[f"{name}_bytes"] for name in ("state", "data", "work"))


def test_the_table_says_what_fits():
    program = {"chips": 8, "batch_size": 4096, "microbatch_size": 256, "view_size": 224}
    figures = {
        "state_bytes": 10**8,
        "data_bytes": 2 * 10**9,
        "work_bytes": 3 * 10**9,
        "total_bytes": 51 * 10**8,
    }
    large = figures | {"total_bytes": 20 * GIB}
    programs = [program | figures, program | large, program | {"chips": 1, "too_large": "no room"}]
    lines = table_text(
        benchmark_compile.table({"target": "v5e", "libtpu": "1.0", "programs": programs}, 16 * GIB)
    ).splitlines()
    assert "TPU v5e" in lines[0] and "not run" in lines[0]
    assert lines[2].split() == ["8", "4,096", "256", "224", "0.10", "2.00", "3.00", "5.10", "yes"]
    assert lines[3].split()[-2:] == ["21.47", "no"]
    assert lines[4].split()[-1] == "no"


def test_the_process_with_the_compiler_gets_the_whole_recipe(monkeypatch, tmp_path, capsys):
    """Its part is done here, by the devices of this machine."""

    class Topology:
        devices = jax.devices()

    named = []
    monkeypatch.setattr(tpu, "find", lambda folder: folder)
    monkeypatch.setattr(benchmark_compile.importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(
        benchmark_compile.topologies,
        "get_topology_desc",
        lambda name, platform: named.append(name) or Topology(),
    )
    monkeypatch.setattr(
        tpu, "apart", lambda module, arguments, folder: benchmark_compile._compile_all(*arguments)
    )
    out = tmp_path / "figures.json"
    recipe = recipes.FOLDER / "shapes.py"
    arguments = [
        *("compile", f"--config={recipe}", "--config.train.batch_size=8", "--config.views.size=16"),
        *("--config.model.width=0.125", "--slices=1,1x2", "--images=100", f"--out={out}"),
    ]
    status = run(monkeypatch, arguments)
    assert status == 0
    found = json.loads(out.read_text())
    assert [program["chips"] for program in found["programs"]] == [1, 2]
    assert [program["batch_size"] for program in found["programs"]] == [8, 8]
    assert named == ["v5e:2x2", "v5e:1x2"]
    assert "yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--target=v9", "known are v5e"),
        ("--slices=2y4", "such as 1 or 2x4"),
        ("--slices=3", "3 chips cannot share a batch of 256"),
        ("--libtpu=/nowhere", "pip install --target /nowhere libtpu"),
    ],
)
def test_bad_flags_are_one_line(flag, said, capsys, monkeypatch):
    if "libtpu" not in flag:
        monkeypatch.setattr(tpu, "find", lambda folder: "")
    recipe = recipes.FOLDER / benchmark_compile.RECIPE
    good = ["--target=v5e", "--slices=1", "--libtpu=", f"--config={recipe}"]  # flags stay from call to call
    status = run(monkeypatch, ["compile", *good, flag])
    error = capsys.readouterr().err.strip()
    assert status == 2 and said in error and "\n" not in error
