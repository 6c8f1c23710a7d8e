"""The benchmark: what is timed is what is said, and the tables and files hold it."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from simclr_jax.benchmark import apart, augment, compiled_chain, compilers, peers, pil_workers, timing, tpu
from simclr_jax.errors import UserError

# As on a machine with neither PyTorch nor Kornia, wherever the tests run.
WITHOUT_PEERS = """
import sys
sys.modules.update(torch=None, torchvision=None, kornia=None)
from simclr_jax.benchmark.__main__ import main
"""


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def images(count, size):
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command with the least to do, and the file it wrote."""
    path = tmp_path_factory.mktemp("benchmark") / "figures.json"
    flags = ["--images=8", "--sizes=16", "--repeats=1", "--operations=hue,chain", f"--out={path}"]
    code = f"{WITHOUT_PEERS}sys.exit(main(['benchmark', 'augment', *{flags}]))"
    return run("-c", code), json.loads(path.read_text())


def test_the_table_has_its_rows_and_columns(tiny):
    done, _ = tiny
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    start = lines.index("8 images of 16x16, ms: median least-most")
    table = [line.split() for line in lines[start + 1 :]]
    assert table[0] == ["fast", "plain", "tutorial", "floor"]
    assert [row[0] for row in table[1:]] == ["chain", "images/s", "fast", "compile", "hue"]
    assert table[-1][-2] == "-"  # the tutorial's chain is timed as a whole
    assert max(map(len, lines)) <= 110


def test_peers_that_are_missing_are_named(tiny):
    lines = tiny[0].stdout.splitlines()
    assert "left out, not installed: PIL and v2 (pip install torch torchvision)" in lines
    assert "left out, not installed: kornia (pip install kornia)" in lines


def test_the_file_has_the_figures_and_where_they_are_from(tiny):
    _, figures = tiny
    assert figures["images"] == 8 and figures["repeats"] == 1 and figures["dtype"] == "float32"
    assert figures["versions"]["jax"] == jax.__version__
    assert figures["hardware"]["cores"] == os.cpu_count()
    assert figures["copy_bytes_per_second"] > 0 and figures["date"]
    chain, hue = figures["augment"]
    assert (chain["operation"], chain["size"]) == ("chain", 16) and hue["operation"] == "hue"
    assert list(chain["peers"]) == ["fast", "plain", "tutorial"] and list(hue["peers"]) == ["fast", "plain"]
    for row in (chain, hue):
        assert row["floor_ms"] > 0
        for peer in row["peers"].values():
            assert peer["ms"]["least"] <= peer["ms"]["median"] <= peer["ms"]["most"]
            assert peer["images_per_second"] == pytest.approx(8000 / peer["ms"]["median"], rel=0.01)
            assert peer["compile_seconds"] > 0


@pytest.mark.parametrize("name", ["", "augmnet"])
def test_an_unknown_benchmark_is_one_line_with_the_names(name):
    done = run("-m", "simclr_jax.benchmark", *([name] if name else []))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "augment" in done.stderr and name in done.stderr


def test_a_bad_flag_is_one_line(tmp_path):
    bad = [
        "--images=0",
        "--repeats=none",
        "--dtype=float64",
        "--size=32",
        "--sizes=32,large",
        "--sizes=4",
        "--sizes=",
        "--operations=chain,colour",
        "--operations=",
        f"--out={tmp_path}",
        "--out=/no/folder/figures.json",
        f"--libtpu={tmp_path}",
        "chain",
    ]
    good = ["--sizes=32", "--operations=hue", "--out=", "--libtpu="]  # flags stay set from call to call
    code = f"{WITHOUT_PEERS}for flag in {bad}: print(main(['benchmark', 'augment', *{good}, flag]))"
    done = run("-c", code)
    assert done.stdout.split() == ["2"] * len(bad), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad), done.stderr
    for flag, line in zip(bad, lines, strict=True):
        assert line.startswith("error: ") and flag.strip("-").partition("=")[0] in line


def test_the_tutorials_chain_gives_views_of_each_image():
    keys = jax.random.split(jax.random.key(0), 4)
    batch = jnp.asarray(images(4, 24) / np.float32(255))
    views = jax.jit(jax.vmap(peers.tutorial_view))(keys, batch)
    assert views.shape == batch.shape and views.dtype == jnp.float32
    assert bool(jnp.all((views >= -1) & (views <= 1)))
    same = jax.jit(jax.vmap(peers.tutorial_view))(keys, jnp.broadcast_to(batch[:1], batch.shape))
    assert len(np.unique(np.asarray(same), axis=0)) == 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_every_operation_makes_views_of_every_image(operation, dtype):
    found = augment.cases(operation, images(3, 16), dtype)
    for name, case in found.items():
        views = jax.eval_shape(case.function, *case.arguments)
        assert views.shape == (3, 16, 16, 3)
        assert views.dtype == ("float32" if name == "tutorial" else dtype)
    expected = {"chain": {"fast", "plain", "tutorial"}, "normalize": {"fast"}}
    assert found.keys() == expected.get(operation, {"fast", "plain"})


@pytest.mark.parametrize("operation", ["crop", "hue", "grayscale", "solarize"])
def test_fast_and_plain_do_the_same_where_nothing_else_is_said(operation):
    found = augment.cases(operation, images(4, 16), "float32")
    fast, plain = (jax.jit(found[name].function)(*found[name].arguments) for name in ("fast", "plain"))
    np.testing.assert_allclose(fast, plain, atol=1e-5)


def test_functions_are_timed_in_turns_after_a_call_that_is_not():
    called = []
    times = timing.in_turns({name: lambda name=name: called.append(name) for name in "ab"}, repeats=3)
    assert called == list("ab" * 4)
    assert [len(time.seconds) for time in times.values()] == [3, 3]


def test_times_are_written_with_their_spread():
    times = timing.Times((0.0125, 0.0119, 1.5))
    assert str(times) == "12.5 11.9-1500"
    assert times.milliseconds() == {"median": 12.5, "least": 11.9, "most": 1500.0}
    written = [timing.short(value) for value in (0.0123, 0.123, 1.234, 9.999, 99.99, 12345.6)]
    assert written == ["0.012", "0.12", "1.23", "10.0", "100", "12346"]


def test_a_program_counts_the_bytes_that_go_in_and_out():
    program = timing.compiled(lambda a, b: (a + b).astype(jnp.bfloat16), jnp.zeros(8), jnp.zeros(8))
    assert program.moved_bytes == 8 * (4 + 4 + 2)
    assert program.compile_seconds > 0


def test_libtpu_is_looked_for_before_anything_is_measured(tmp_path):
    with pytest.raises(UserError, match=f"pip install --target {tmp_path} libtpu"):
        tpu.find(str(tmp_path))
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "libtpu.so").touch()
    assert tpu.find(str(tmp_path)) == str(tmp_path)


def test_a_compiler_that_fails_is_said_in_one_line(tmp_path):
    (tmp_path / "libtpu").mkdir()
    (tmp_path / "libtpu" / "libtpu.so").touch()
    (tmp_path / "libtpu" / "__init__.py").write_text("raise ImportError('made for another machine')")
    with pytest.raises(compilers.CompilerError, match=r"^the compiler for the TPU failed: .+$"):
        compiled_chain.compile_apart([96], 2, str(tmp_path))


def test_the_table_of_the_tpu_has_ratios():
    common = {"size": 96, "images": 512, "flops": 1_000, "temporary_bytes": 0, "compile_seconds": 1.0}
    common["input_output_bytes"] = 10_000_000
    programs = [
        common | {"form": "fast", "dtype": "float32", "bytes_accessed": 200_000_000},
        common | {"form": "plain", "dtype": "float32", "bytes_accessed": 500_000_000},
    ]
    lines = compiled_chain.table({"target": "v5e", "compiler": "libtpu 1.0", "programs": programs})
    assert lines[-1].split()[:6] == ["plain", "float32", "96", "0.500", "2.50", "x"]
    assert max(map(len, lines)) <= 110


def test_workers_need_no_jax():
    code = "import sys, simclr_jax.benchmark.pil_workers; sys.exit('jax' in sys.modules)"
    assert run("-c", code).returncode == 0


@pytest.fixture(scope="module")
def torchvision():
    pytest.importorskip("torch")
    return peers.import_torchvision() or pytest.skip("torchvision is not installed")


@pytest.fixture(scope="module")
def kornia():
    pytest.importorskip("torch")
    return peers.import_kornia() or pytest.skip("kornia is not installed")


@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_v2_makes_a_view_of_every_image(torchvision, operation):
    assert peers.v2_pass(operation, images(3, 16), 3, threads=1)().shape == (3, 3, 16, 16)


@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_kornia_makes_a_view_of_every_image(kornia, operation):
    assert peers.kornia_pass(operation, images(3, 16), 3, threads=1)().shape == (3, 3, 16, 16)


@pytest.mark.parametrize("operation", peers.OPERATIONS)
def test_a_pil_image_becomes_a_view(torchvision, operation):
    view = peers.torchvision_operation(operation, 16, 3, pil=True)(Image.fromarray(images(1, 16)[0]))
    if operation in ("chain", "normalize"):
        assert view.shape == (3, 16, 16)
    else:
        assert (view.size, view.mode) == ((16, 16), "RGB")


def test_workers_take_images_that_do_not_divide_among_them(torchvision):
    with pil_workers.PilWorkers(2) as workers:
        workers.load(images(1, 16))
        workers.run("hue", 3)
        workers.load(images(3, 24))
        workers.run("chain", 3)
        with pytest.raises(apart.WorkerError, match="KeyError: 'shear'"):
            workers.run("shear", 3)
