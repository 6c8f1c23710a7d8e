"""The benchmark of training: one workload, measured and told, with PyTorch and without it."""

import contextlib
import json
import math
import os
import sys
import time
import types
import warnings
from typing import Any

import jax
import numpy as np
import pytest

from simclr_jax.benchmark import apart, jax_train, logistic, peak, peers, recipes, timing, train, workloads
from simclr_jax.benchmark.__main__ import main
from simclr_jax.errors import UserError
from simclr_jax.table import table_text

pytestmark = [
    pytest.mark.usefixtures("kept_compilations"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of Kornia and PyTorch
    pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning"),  # of ml_collections
]

TINY = workloads.Workload(
    "a small one",
    "cifar10.py",
    {
        "data.canvas_size": 16,
        "views.size": 16,
        "run.data_dir": "/nowhere",
        "views.jitter": 0.0,
        "model.stem": "imagenet",
        "model.depth": 10,
        "model.head_hidden": 8,
        "model.head_out": 8,
    },
    *(24, 8, 4),
)


MACHINE = {"product_flops_per_second": {"float32": 1e11}, "product_side": 8, "copy_bytes_per_second": 1e10}


class InThisProcess:
    """In place of `apart.Worker`."""

    def __init__(self, module, name, *arguments):
        module = __import__(module, fromlist=[name])
        options = {"workers": 0} if name == "Loaded" else {}
        self._made = getattr(module, name)(*arguments, **options)

    def ask(self, method, *arguments):
        return getattr(self._made, method)(*arguments)

    def end(self):
        pytest.fail("it did not fail")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def run_tiny(folder, *flags):
    """What the command prints and writes with little to do, all in this process."""
    said = []
    out = folder / "figures.json"
    argv = ["benchmark", "train", "--workloads=tiny", "--batch=0", "--steps=1", "--repeats=2", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "WORKLOADS", {"tiny": TINY})
        patch.setattr(peak, "in_fresh_process", lambda function, *arguments: function(*arguments))
        patch.setattr(apart, "Worker", InThisProcess)
        patch.setattr(jax_train, "_PRODUCT_SIDE_ON_CPU", 128)
        patch.setattr(timing, "_COPIED_BYTES", 1_000_000)
        patch.setattr(timing, "cores", lambda: 1)
        patch.setattr(train, "say", said.append)
        assert main([*argv, *flags]) == 0
    return "\n".join(said).splitlines(), json.loads(out.read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """On a machine without PyTorch, wherever the tests run."""
    with pytest.MonkeyPatch.context() as patch:
        for module in ("torch", "torchvision", "kornia"):
            patch.setitem(sys.modules, module, None)
        return run_tiny(tmp_path_factory.mktemp("alone"), "--frameworks=ours,torchvision,kornia")


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if peers.import_torchvision() is None or peers.import_kornia() is None:
            pytest.skip("torchvision or kornia is not installed")
    return run_tiny(tmp_path_factory.mktemp("beside"), "--frameworks=torchvision,kornia")


def test_without_pytorch_ours_is_measured_and_the_rest_named_with_its_remedy(alone):
    lines, figures = alone
    assert "torchvision is left out, not installed: pip install torch torchvision" in lines
    assert "kornia is left out, not installed: pip install torch torchvision kornia" in lines
    assert list(figures["left_out"]) == ["torchvision", "kornia"]
    start = lines.index("tiny: a small one, 16 pixels, batch 4, float32")
    assert lines[start + 1].split()[:2] == ["images/s", "least-most"]
    assert [line.split()[0] for line in lines[start + 2 : start + 4]] == ["ours", "floor"]
    note = " ".join(lines[start + 4 :])
    assert note.startswith("Images: noise, as cifar10 is not prepared in /nowhere")
    assert max(map(len, lines)) <= 110


def test_the_file_has_the_figures_and_where_they_are_from(alone):
    _, figures = alone
    assert figures["versions"]["jax"] == jax.__version__ and figures["date"]
    assert figures["hardware"]["cores"] and figures["copy_bytes_per_second"] > 0
    found = figures["workloads"]["tiny"]
    assert (found["batch"], found["images"], found["dtype"]) == (4, 24, "float32")
    assert found["config"]["model"]["depth"] == 10
    ours = found["frameworks"]["ours"]
    assert ours["steps_a_turn"] == 1 and ours["times_slower"] == 1
    assert ours["ms"]["least"] <= ours["ms"]["median"] <= ours["ms"]["most"]
    rates = ours["images_per_second"]
    assert rates["most"] == pytest.approx(4000 / ours["ms"]["least"], rel=0.01)
    assert rates["least"] == pytest.approx(4000 / ours["ms"]["most"], rel=0.01)
    assert ours["parts_ms"].keys() == set(train.PARTS) and min(ours["parts_ms"].values()) > 0
    assert ours["start_seconds"] > ours["compile_seconds"] > 0
    work = found["least_work"]
    rate = figures["product_flops_per_second"]["float32"]
    assert ours["share_of_product_rate"] == pytest.approx(
        1000 * work["flops"] / rate / ours["ms"]["median"], abs=1e-4
    )
    bounds = work["flops"] / rate, work["bytes"] / figures["copy_bytes_per_second"]
    assert found["floor"]["ms"] == pytest.approx(1000 * max(bounds), rel=0.01)


def test_the_work_is_that_of_the_network(alone):
    """A ResNet-10 sees 8 views of 16 pixels, and its gradient costs twice its output."""
    work = alone[1]["workloads"]["tiny"]["least_work"]

    def taps(side, kernel, stride):
        """Multiplications a pair of channels, without those by the zeros around the map."""
        at = np.arange(0, side, stride)[:, None] + np.arange(kernel) - kernel // 2
        return np.sum((at >= 0) & (at < side)) ** 2

    stem, first = 3 * 64 * taps(16, 7, 2), 2 * 64 * 64 * taps(4, 3, 1)
    rest = sum(
        c * c * (taps(side, 3, 2) / 2 + taps(-(-side // 2), 3, 1) + taps(side, 1, 2) / 2)
        for side, c in ((4, 128), (2, 256), (1, 512))
    )
    head, similarities = 512 * 8 + 8 * 8, 8 * 8
    forward = stem + first + rest + head + similarities
    assert work["flops"] == 8 * 2 * (3 * forward - stem)  # views have no gradient
    weights = 4_910_000
    assert work["bytes"] > 2 * 3 * 4 * weights  # parameters, momentum, gradient


def test_pytorch_is_measured_without_ours(beside):
    lines, figures = beside
    start = lines.index("tiny: a small one, 16 pixels, batch 4, float32")
    assert [line.split()[0] for line in lines[start + 2 : start + 5]] == ["torchvision", "kornia", "floor"]
    assert max(map(len, lines)) <= 110
    for one in figures["workloads"]["tiny"]["frameworks"].values():
        assert one["threads"] >= 1 and one["start_seconds"] > 0
        assert "times_slower" not in one and one["share_of_product_rate"] > 0
        assert one["parts_ms"].keys() == set(train.PARTS)


class Told:
    """A worker whose steps take what it is told, in seconds, and which fails the n-th time it is asked so."""

    def __init__(self, *seconds, fails=None, time=1):
        self._seconds, self._fails, self._time = list(seconds), fails, time
        self.asked, self.ended = [], 0

    def ask(self, method, *arguments):
        self.asked.append((method, *arguments))
        if sum(asked[0] == self._fails for asked in self.asked) == self._time:
            raise apart.WorkerError("Traceback ...\nMemory: full\nTry this", "torch.OutOfMemoryError: full")
        if method == "time":
            return self._seconds[len(self.asked) % len(self._seconds)] if arguments[0] == "step" else 0.1
        return {"start": {"start_seconds": 9.0, "uncompiled": "no C++"}, "peak": None}[method]

    def end(self):
        self.ended += 1


@pytest.mark.parametrize("failed", [Told(1.0, fails="peak"), Told(1.0, fails="time", time=9)])
def test_a_turn_is_a_second_or_a_step_and_who_fails_is_left_out(failed):
    """At the beginning, or in a later turn."""
    quick, slow = Told(0.1), Told(4.0)
    workers: Any = {"ours": quick, "torchvision": slow, "kornia": failed}
    found = train.measure(workers, batch=8, steps=0, repeats=2)
    assert ("time", "step", 10) in quick.asked and ("time", "views", 3) in quick.asked
    assert ("time", "step", 1) in slow.asked
    assert found["kornia"].pop("traceback").endswith("Try this")
    assert found["kornia"] == {"not_run": "torch.OutOfMemoryError: full"}
    assert failed.ended == 1 and quick.ended == slow.ended == 0
    assert sum(method == "time" for method, *_ in failed.asked) in (0, 9)
    compared, floor = train.compare(found, {"flops": 1e9, "bytes": 5e9}, product_rate=1e11, copy_rate=1e11)
    assert compared["torchvision"]["times_slower"] == 40
    assert compared["ours"]["share_of_product_rate"] == 0.1
    assert floor == {"ms": 50, "bound": "bytes"}
    figures = {"name": "x", "about": "y", "side": 8, "batch": 8, "dtype": "float32", "on_cpu": True}
    text = table_text(train.table(figures | {"data": "z", "floor": floor, "frameworks": compared}))
    assert "torchvision could not be compiled: no C++" in " ".join(text.split())
    rows = [line.split() for line in text.splitlines()[2:6]]
    assert rows[0][:4] == ["ours", "80.0", "80.0-80.0", "100"] and rows[0][-2:] == ["1.00", "x"]
    assert rows[1][-2:] == ["40.00", "x"] and set(rows[2][1:]) == {"–"}
    assert rows[3] == ["floor", "160.0", "50.0", "0.50", "x"]
    assert "kornia was not run: torch.OutOfMemoryError" in " ".join(text.split())


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_a_cpu_has_smaller_batches_in_float32(name):
    config = workloads.WORKLOADS[name].config(on_cpu=True)
    assert (config.model.dtype, config.views.dtype) == ("float32", "float32")
    assert config.train.batch_size < workloads.WORKLOADS[name].config(on_cpu=False).train.batch_size
    assert workloads.WORKLOADS[name].config(on_cpu=True, batch=10).train.batch_size == 10


def test_without_the_recipes_it_says_where_they_are(monkeypatch, tmp_path):
    monkeypatch.setattr(recipes, "FOLDER", tmp_path)
    with pytest.raises(UserError, match="clone of the repository"):
        TINY.config(on_cpu=True)


def test_noise_is_gone_afterwards():
    with workloads.open_images(TINY.config(on_cpu=True), 12) as found:
        assert found.pack.canvas.shape == (12, 16, 16, 3) and found.about.startswith("noise")
        assert os.path.exists(found.file)
    assert not os.path.exists(found.file)


def test_real_images_are_used_where_they_are_prepared(tmp_path):
    config = TINY.config(on_cpu=True)
    config.data.dataset, config.run.data_dir, config.data.split = "shapes", "", "train[:30]"
    with workloads.open_images(config, 12) as found:
        assert found.about == "shapes[train[:30]]" and found.file.endswith("canvas.npy")
        assert len(found.pack) == 30


def test_a_worker_answers_and_tells_what_went_wrong():
    with apart.Worker("json", "JSONDecoder") as worker:
        assert worker.ask("decode", "[1]") == [1]
        with pytest.raises(apart.WorkerError, match="JSONDecodeError: Expecting value") as raised:
            worker.ask("decode", "[")
        assert (
            raised.value.reason == "json.decoder.JSONDecodeError: Expecting value: line 1 column 2 (char 1)"
        )
        assert worker.ask("decode", "[2]") == [2]
        worker._process.kill()
        with pytest.raises(apart.WorkerError, match="killed"):
            worker.ask("decode", "[3]")


def test_who_fails_is_ended_and_the_others_go_on():
    with contextlib.ExitStack() as stack:
        workers = {
            name: stack.enter_context(apart.Worker("json", "JSONDecoder")) for name in ("sound", "failing")
        }
        group = apart.Group(workers)
        assert group.ask("failing", "decode", "[") is None
        assert not workers["failing"]._process.is_alive()
        assert group.ask("failing", "decode", "[1]") is None and math.isnan(group.time("failing"))
        assert group.ask("sound", "decode", "[1]") == [1]
        assert list(group.failed) == ["failing"]
        told = group.not_run("failing")
    assert told["not_run"].startswith("json.decoder.JSONDecodeError") and "Traceback" in told["traceback"]


def test_at_ctrl_c_a_worker_ends_at_once():
    began = time.monotonic()
    with contextlib.suppress(KeyboardInterrupt), apart.Worker("threading", "Event") as worker:
        worker._connection.send(("wait", (60,)))
        raise KeyboardInterrupt
    assert not worker._process.is_alive()
    assert time.monotonic() - began < 30


def test_a_bad_flag_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(peak, "in_fresh_process", lambda *_: pytest.fail("nothing to run"))
    good = ["--workloads=cifar10", "--frameworks=ours", "--batch=0", "--steps=0", "--repeats=1", "--out="]
    bad = [
        "--workloads=imagenet",
        "--frameworks=jax",
        "--frameworks=",
        "--batch=-1",
        "--steps=-1",
        "--repeats=0",
        "--out=/no/folder/figures.json",
        "cifar10",
    ]
    for flag in bad:
        assert main(["benchmark", "train", *good, flag]) == 2, flag
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        assert flag.strip("-").partition("=")[0] in lines[0], lines


def test_where_nothing_can_be_measured_it_is_said(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    flags = ["--workloads=cifar10", "--frameworks=kornia", "--batch=0", "--out="]
    assert main(["benchmark", "train", *flags]) == 2
    assert "pip install torch" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_set_is_one_line(monkeypatch):
    monkeypatch.setattr(train, "WORKLOADS", {"tiny": TINY})
    config = TINY.config(on_cpu=True, batch=100)
    with pytest.raises(UserError, match="24 images"):
        train._workload("tiny", config, ["ours"], {})


def test_logistic_regression_is_told_with_what_it_reached(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(peak, "in_fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(jax_train, "machine", lambda: {**timing.circumstances(), **MACHINE})
    monkeypatch.setattr(apart, "Worker", InThisProcess)
    monkeypatch.setattr(logistic, "_ROWS", 300)
    monkeypatch.setattr(logistic, "_WIDTH", 8)
    flags = ["--workloads=logistic", "--frameworks=ours", "--repeats=2", f"--out={tmp_path / 'x.json'}"]
    assert main(["benchmark", "train", *flags]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("logistic: regression on 300 embeddings, 8 wide, 10 classes")
    row = lines[start + 2].split()
    assert row[:2] == ["ours,", "probe.fit"] and row[-2:] == ["1.00", "x"]
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["workloads"] == {}
    ours = found["logistic"]["ours"]
    assert row[-3] == f"{ours['objective']:.7f}" and 0 < ours["objective"] < math.log(10)
    assert ours["first_seconds"] > 0 and ours["ms"]["least"] <= ours["ms"]["median"]


def test_a_fit_that_fails_is_left_out(monkeypatch):
    def answer(seconds, fails):
        weights = np.zeros((8, 10)), np.zeros(10)

        def ask(method):
            if fails:
                raise apart.WorkerError("RuntimeError: no cuBLAS")
            return {"time": seconds, "solution": weights}[method]

        return contextlib.nullcontext(types.SimpleNamespace(ask=ask, end=lambda: None))

    made = iter([answer(0.5, fails=True), answer(2.0, fails=False), answer(3.0, fails=False)])
    monkeypatch.setattr(apart, "Worker", lambda *_: next(made))
    monkeypatch.setattr(logistic, "_ROWS", 30)
    monkeypatch.setattr(logistic, "_WIDTH", 8)
    found = logistic.measure(["ours", "torchvision", "kornia"], 2)
    assert found["ours"]["not_run"] == "RuntimeError: no cuBLAS"
    assert [found[name]["times_slower"] for name in ("torchvision", "kornia")] == [1, 1.5]
    text = " ".join(table_text(logistic.table(found)).split())
    assert "ours, probe.fit was not run: RuntimeError: no cuBLAS." in text


def test_the_objective_of_zero_is_that_of_a_guess():
    features, labels = logistic.embeddings()
    zeros = np.zeros((512, 10)), np.zeros(10)
    assert logistic.objective(features, labels, *zeros) == pytest.approx(math.log(10))
    ones = np.ones((512, 10)), np.ones(10)
    assert logistic.objective(features, labels, *ones) == pytest.approx(math.log(10) + 5120 / 2 * logistic.L2)
