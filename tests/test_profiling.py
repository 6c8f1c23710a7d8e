"""A trace of some calls: it is whole, it ends in any case, and it changes nothing of the run."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from simclr_jax import paths, profiling, train
from simclr_jax.config import default_config
from simclr_jax.interrupt import StopRequest

pytestmark = [
    pytest.mark.usefixtures("kept_compilations"),
    # Python 3.12 says so of jaxlib's type of an event's statistics, where an exception ends the process.
    pytest.mark.filterwarnings("ignore:builtin type .* has no __module__:DeprecationWarning"),
]


def traces(workdir):
    """The files where TensorBoard looks for them."""
    return list(workdir.glob("plugins/profile/*/*.xplane.pb"))


def traced_steps(workdir):
    """The first steps of the traced calls."""
    (file,) = traces(workdir)
    lines = [line for plane in ProfileData.from_file(str(file)).planes for line in plane.lines]
    events = [event for line in lines for event in line.events if event.name == "call"]
    return sorted(dict(event.stats)["step_num"] for event in events)


def make_calls(workdir, count):
    """Calls of 10 steps; what waiting and going on were asked for."""
    asked = []
    work = jax.jit(lambda x: x @ x)
    with profiling.Trace(
        workdir, wait=lambda: asked.append("wait"), resume=lambda: asked.append("resume")
    ) as trace:
        for number in range(count):
            with trace.call(10 * number):
                work(jnp.ones((8, 8))).block_until_ready()
    return asked


def test_some_calls_after_the_warm_up_are_traced(tmp_path, capsys):
    assert make_calls(tmp_path, 9) == ["wait", "resume"] * 2
    assert traced_steps(tmp_path) == [40, 50, 60]
    (line,) = capsys.readouterr().out.splitlines()
    assert "traced 3 calls, from step 40 on" in line and f"tensorboard --logdir {tmp_path}" in line


def test_what_there_is_is_traced_where_the_run_ends_before(tmp_path, capsys):
    make_calls(tmp_path, 6)
    assert traced_steps(tmp_path) == [40, 50]
    assert "traced 2 calls" in capsys.readouterr().out


def test_a_run_too_short_is_told(tmp_path, capsys):
    make_calls(tmp_path, 4)
    assert not any(tmp_path.iterdir())
    assert "no trace: it begins with call 5 of the step; there were 4" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["wait", "step"])
def test_a_failure_ends_the_trace(tmp_path, failing):
    """Only one can be under way in a process."""

    def wait():
        if failing == "wait" and calls == 6:
            raise ArithmeticError

    calls = 0
    with (
        pytest.raises(ArithmeticError),
        profiling.Trace(tmp_path, wait=wait, resume=lambda: None) as trace,
    ):
        for calls in range(8):
            with trace.call(calls):
                if failing == "step" and calls == 5:
                    raise ArithmeticError
    assert len(traces(tmp_path)) == 1
    make_calls(tmp_path / "next", 9)
    assert len(traces(tmp_path / "next")) == 1


def test_on_object_storage_it_comes_at_the_end(bucket):
    make_calls(paths.parse("gs://bucket/run"), 9)
    assert traced_steps(bucket / "run") == [40, 50, 60]


def tiny():
    settings = default_config()
    settings.data.update({"dataset": "shapes", "split": "train[:64]", "canvas_size": 16})
    settings.views.size = 16
    settings.model.update({"depth": 10, "width": 0.125})
    settings.train.update({"batch_size": 16, "steps": 9})
    settings.evaluation.update({"dataset": "shapes", "bank_split": "train[:100]", "query_split": "test[:16]"})
    settings.run.log_every_steps = 1
    return settings


def losses(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "parameter_norm")
    return [[record[name] for name in names] for record in records if "loss" in record]


def test_a_traced_run_learns_the_same(tmp_path, capsys):
    for name in ("plain", "traced"):
        assert train.train(tiny(), tmp_path / name, StopRequest(), profile=name == "traced")
    assert losses(tmp_path / "traced") == losses(tmp_path / "plain")
    assert not traces(tmp_path / "plain")
    assert traced_steps(tmp_path / "traced") == [4, 5, 6]
    assert "traced 3 calls, from step 4 on" in capsys.readouterr().out


def test_asked_to_stop_within_the_trace_it_ends_that_too(tmp_path, monkeypatch):
    def call(self, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return traced(self, step)

    traced = profiling.Trace.call
    monkeypatch.setattr(profiling.Trace, "call", call)
    stop = StopRequest()
    assert train.train(tiny(), tmp_path / "run", stop, profile=True) is None
    assert stop and traced_steps(tmp_path / "run") == [4, 5]
