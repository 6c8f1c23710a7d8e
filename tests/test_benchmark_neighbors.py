"""The benchmark of the search: everyone finds the same, memory is what was taken, and the file holds it."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from simclr_jax.benchmark import neighbors, peak, timing
from simclr_jax.errors import UserError
from simclr_jax.neighbors import METRICS

# Without faiss wherever the tests run, and with a small product for the floor.
SMALL = """
import sys
sys.modules.update(faiss=None)
from simclr_jax.benchmark import neighbors
from simclr_jax.benchmark.__main__ import main
neighbors._SIDE = 256
"""


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The command with little to do, and the file it wrote."""
    pytest.importorskip("sklearn")
    path = tmp_path_factory.mktemp("benchmark") / "figures.json"
    flags = ["--queries=40", "--bank=300", "--width=16", "--k=3", "--repeats=2", "--metric=cosine"]
    return run(f"{SMALL}sys.exit(main(['benchmark', 'neighbors', *{flags}, '--out={path}']))"), path


def test_the_table_has_its_rows(tiny):
    done, _ = tiny
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    start = lines.index("40 queries, a bank of 300, width 16, k 3, cosine")
    assert [line.split()[0] for line in lines[start + 2 :]] == ["simclr_jax", "scikit-learn", "floor"]
    assert max(map(len, lines)) <= 110


def test_a_peer_that_is_missing_is_named_with_its_remedy(tiny):
    assert "faiss is left out, not installed: pip install -e '.[benchmark]'" in tiny[0].stdout.splitlines()


def test_the_file_has_the_figures_and_where_they_are_from(tiny):
    figures = json.loads(tiny[1].read_text())
    assert [figures[name] for name in ("queries", "bank", "width", "k", "metric")] == [
        *(40, 300, 16, 3, "cosine")
    ]
    assert figures["versions"]["numpy"] == np.__version__ and figures["date"]
    assert figures["hardware"]["cores"] == os.cpu_count()
    assert list(figures["left_out"]) == ["faiss"]
    assert list(figures["searches"]) == ["simclr_jax", "scikit-learn"]
    for search in figures["searches"].values():
        assert search["ms"]["least"] <= search["ms"]["median"] <= search["ms"]["most"]
        assert search["same_index"] == 1
    ours, theirs = figures["searches"].values()
    assert ours["times_slower"] == 1
    assert theirs["times_slower"] == pytest.approx(theirs["ms"]["median"] / ours["ms"]["median"], rel=0.01)
    rate = max(figures["product_flops_per_second"].values())
    assert figures["floor_ms"] == pytest.approx(1000 * 2 * 40 * 300 * 16 / rate, abs=1e-4)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux alone")
def test_compilation_is_in_the_memory(tiny):
    extra = json.loads(tiny[1].read_text())["extra_bytes"]
    assert extra > 20e6  # bytes; a second search of arrays so small takes next to nothing


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("peer", "module"), neighbors.PEERS.items())
def test_everyone_finds_the_nearest(peer, module, metric):
    pytest.importorskip(module)  # within it faiss may warn of how SWIG made its types
    queries, bank = neighbors.normal_rows(30, 8, 0), neighbors.normal_rows(400, 8, 1)
    # Of other lengths, so that a peer with the wrong metric finds others.
    bank *= np.linspace(0.5, 2, 400, dtype=np.float32)[:, None]
    a, b = queries.astype(np.float64), bank.astype(np.float64)
    if metric == "cosine":
        a, b = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (a, b))
    expected = np.argsort(np.linalg.norm(a[:, None] - b[None], axis=2), axis=1)[:, :5]
    found = neighbors.searches(queries, bank, 5, metric, [peer])
    assert list(found) == [neighbors.OURS, peer]
    for search in found.values():
        np.testing.assert_array_equal(search(), expected)


def test_other_indices_and_times_are_compared_with_ours(monkeypatch):
    taken = {neighbors.OURS: (1.0, 2.0, 3.0), "faiss": (6.0, 5.0, 1.0)}

    def in_turns(functions, repeats):
        for function in functions.values():
            function()
        return {name: timing.Times(taken[name][:repeats]) for name in functions}

    monkeypatch.setattr(timing, "in_turns", in_turns)
    indices = {neighbors.OURS: np.array([[0, 1], [2, 3]]), "faiss": np.array([[0, 1], [3, 2]])}
    runs = {name: lambda found=found: found for name, found in indices.items()}
    times, figures = neighbors.measure(runs, 3)
    assert figures["faiss"]["same_index"] == 0.5 and figures["faiss"]["times_slower"] == 2.5
    for memory, said in ((None, "not measured"), (612_300_000, "612 MB")):
        ours, faiss, floor = neighbors.rows(
            times, {"extra_bytes": memory, "searches": figures, "floor_ms": 500.0}
        )[1:]
        assert ours.split() == [
            "simclr_jax",
            "2.00",
            "(1.00-3.00)",
            "1.00",
            "x",
            "100.00",
            "%",
            *said.split(),
        ]
        assert faiss.split() == ["faiss", "5.00", "(1.00-6.00)", "2.50", "x", "50.00", "%"]
        assert floor.split() == ["floor", "0.50", "0.25", "x"]


def test_a_rate_is_that_of_the_fastest_product(monkeypatch):
    monkeypatch.setattr(timing, "in_turns", lambda runs, _: {name: timing.Times((4.0, 2.0)) for name in runs})
    assert timing.product_rates(8, 2) == {"JAX": 512, "NumPy": 512}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is measured on Linux alone")
def test_the_peak_is_what_was_held_at_once():
    def hold(megabytes):
        return lambda: np.ones(megabytes * 125_000).sum()

    extra = [peak.resident(hold(megabytes)) for megabytes in (200, 0, 100)]
    assert None not in extra
    np.testing.assert_allclose(np.array(extra, float) / 1e6, [200, 0, 100], atol=20)


def test_memory_that_the_system_does_not_tell_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(peak, "_PROCESS", tmp_path)
    assert peak.resident(lambda: pytest.fail("nothing to run")) is None


def test_rows_that_no_memory_can_hold_are_one_line():
    with pytest.raises(UserError, match="lower --bank or --width"):
        neighbors.extra_memory(1, 1, 2**58, 1, "euclidean")


def test_faiss_is_left_out_where_its_copy_would_be_large(monkeypatch):
    monkeypatch.setitem(neighbors.PEERS, "faiss", "json")  # which is installed
    assert neighbors.left_out(["faiss"], 10**9) == {}
    assert neighbors.left_out(["faiss"], 2 * 10**9) == {"faiss": "it would copy the bank, which takes 2.0 GB"}
    assert neighbors.left_out([], 2 * 10**9) == {}


def test_a_bad_flag_is_one_line(tmp_path):
    bad = [
        "--queries=0",
        "--bank=none",
        "--width=0",
        "--k=50001",
        "--metric=l1",
        "--repeats=0",
        "--peers=annoy",
        "--peers=",
        f"--out={tmp_path}",
        "--out=/no/folder/figures.json",
    ]
    # Flags stay set from call to call.
    good = [
        *("--queries=9", "--bank=50000", "--width=9", "--k=1", "--metric=cosine", "--repeats=1"),
        *("--peers=none", "--out="),
    ]
    done = run(f"{SMALL}for flag in {bad}: print(main(['benchmark', 'neighbors', *{good}, flag]))")
    assert done.stdout.split() == ["2"] * len(bad), done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad), done.stderr
    for flag, line in zip(bad, lines, strict=True):
        assert line.startswith("error: ") and flag.strip("-").partition("=")[0] in line
