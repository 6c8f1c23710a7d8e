import importlib.metadata
import json
import sys

import jax
import pytest
from jax.experimental import topologies

from simclr_jax import command, config, workdirs
from simclr_jax.benchmark import compile as benchmark_compile
from simclr_jax.benchmark import compilers, gpu, recipes, tpu
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
        "compile_seconds": 40.4,
    }
    large = figures | {"total_bytes": 20 * GIB}
    programs = [program | figures, program | large, program | {"chips": 1, "too_large": "no room"}]
    found = {"target": "v5e", "compiler": "libtpu 1.0", "programs": programs}
    lines = table_text(benchmark_compile.table(found)).splitlines()
    assert "TPU v5e with 16.9 GB" in lines[0] and "libtpu 1.0" in lines[0] and "not run" in lines[0]
    assert lines[2].split() == ["8", "4,096", "256", "224", "40", "0.10", "2.00", "3.00", "5.10", "yes"]
    assert lines[3].split()[-2:] == ["21.47", "no"]
    assert lines[4].split()[-1] == "no"


@pytest.fixture
def asked(monkeypatch):
    """The topologies that are asked for; the compiler's part is done by the devices of this machine."""

    class Topology:
        devices = jax.devices()

    found = []

    def topology(name=None, *, platform, target_config="", topology=None):
        described = [chip.name for chip in gpu.GPUS.values() if chip.name in target_config]
        found.append((platform, name or topology, *described))
        return Topology()

    monkeypatch.setattr(topologies, "get_topology_desc", topology)
    monkeypatch.setattr(tpu, "find", lambda folder: folder)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.0")
    monkeypatch.setattr(
        compilers, "apart", lambda module, arguments, *_, **__: benchmark_compile._compile_all(*arguments)
    )
    return found


def test_the_process_with_the_compiler_gets_the_whole_recipe(asked, monkeypatch, tmp_path, capsys):
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
    assert asked == [("tpu", "v5e:2x2"), ("tpu", "v5e:1x2")]
    assert "yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "slices", "topologies_asked"),
    [("l4", "", ["1x1x1"]), ("h100", "1,8", ["1x1x1", "1x1x8"])],
)
def test_a_gpu_is_described_to_its_compiler(target, slices, topologies_asked, asked, tmp_path):
    workdirs.create(tmp_path, small())
    found = benchmark_compile._compile_all(
        str(tmp_path), target, slices or ",".join(benchmark_compile.TARGETS[target].slices), "100"
    )
    name = gpu.GPUS[target].name
    assert asked == [("cuda", topology, name) for topology in topologies_asked]
    assert found["compiler"] == "jax-cuda13-plugin 1.0" and len(found["programs"]) == len(asked)
    assert name in table_text(benchmark_compile.table(found))


def test_the_compiler_for_a_gpu_reads_its_description():
    """Where the plugin is installed, which without a GPU is seldom."""
    if gpu.compiler() is None:
        pytest.skip("JAX's CUDA plugin is not installed")
    for target, chip in gpu.GPUS.items():
        (device,) = gpu.devices(target, [1])
        assert device.device_kind == chip.name


def test_a_compiler_that_fails_is_one_line(monkeypatch, capsys):
    def fail(*_, **__):
        raise compilers.CompilerError("the compiler for the NVIDIA L4 failed: too old")

    monkeypatch.setattr(gpu, "compiler", lambda: "plugin 1.0")
    monkeypatch.setattr(compilers, "apart", fail)
    recipe = recipes.FOLDER / benchmark_compile.RECIPE
    assert run(monkeypatch, ["compile", "--target=l4", "--slices=", "--out=", f"--config={recipe}"]) == 2
    assert capsys.readouterr().err.strip() == "error: the compiler for the NVIDIA L4 failed: too old"


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--target=v9", "known are v5e, t4, l4, a100, h100"),
        ("--target=t4", 'pip install "jax[cuda13]"'),
        ("--slices=2y4", "such as 1 or 2x4"),
        ("--slices=3", "3 chips cannot share a batch of 256"),
        ("--libtpu=/nowhere", "pip install --target /nowhere libtpu"),
    ],
)
def test_bad_flags_are_one_line(flag, said, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "compiler", lambda: None)
    if "libtpu" not in flag:
        monkeypatch.setattr(tpu, "find", lambda folder: "")
    recipe = recipes.FOLDER / benchmark_compile.RECIPE
    good = ["--target=v5e", "--slices=1", "--libtpu=", f"--config={recipe}"]  # flags stay from call to call
    status = run(monkeypatch, ["compile", *good, flag])
    error = capsys.readouterr().err.strip()
    assert status == 2 and said in error and "\n" not in error
