"""The loop and the signals around it, on a state that counts."""

import json
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax import interrupt, loop
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest
from simclr_jax.training import TrainState


class Batches:
    def __init__(self, steps_per_call=1):
        self.steps_per_call = steps_per_call

    def call(self, step, count):
        return (), jnp.zeros((1, 1), jnp.int32)


class Log:
    def metrics(self, step, values): ...

    def progress(self, step, values): ...

    def sync(self): ...


class Checkpoints:
    """Notes what it is asked; `busy` calls of the loop find it writing."""

    def __init__(self, busy=0, failing=False):
        self.saved, self.busy, self.failing, self.waited = [], busy, failing, False

    @property
    def writing(self):
        self.busy -= 1
        return self.busy >= 0

    def raise_if_failed(self):
        if self.failing and self.saved:
            raise UserError("the disk is full")

    def save(self, step, state, *, seconds, metrics, unlogged):
        self.saved.append((step, "accuracy" in metrics))

    def wait(self):
        self.waited = True


def fit(
    stop, checkpoints, *, steps=6, every=0, seconds=0.0, evaluate=None, run_steps=None, at_once=1, log_every=1
):
    log: Any = Log()

    def count(state, arrays, indices, count):
        return state.replace(step=state.step + 1), {"loss": jnp.ones(1), "update_norm": jnp.ones(1)}

    with stop:
        state = loop.fit(
            TrainState(jnp.int32(0), {}, {}, ()),
            total_steps=steps,
            batches=Batches(at_once),
            run_steps=run_steps or count,
            evaluate=evaluate or (lambda state: {"accuracy": 0.5}),
            evaluate_every_steps=every,
            log_every_steps=log_every,
            checkpoint_seconds=seconds,
            meter=loop.Meter(1, step=0, seconds=0.0),
            log=log,
            checkpoints=checkpoints,
            stop=stop,
        )
    return int(state.step)


def test_a_save_that_is_due_is_put_off_while_the_last_is_being_written():
    checkpoints = Checkpoints(busy=3)
    assert fit(StopRequest(), checkpoints) == 6
    assert [step for step, _ in checkpoints.saved] == [4, 5, 6]
    assert checkpoints.waited


def test_a_save_after_an_evaluation_is_not_put_off():
    checkpoints = Checkpoints(busy=100)
    fit(StopRequest(), checkpoints, every=2)
    assert checkpoints.saved == [(2, True), (4, True), (6, True)]


def test_what_an_evaluation_found_is_not_said_of_later_steps():
    checkpoints = Checkpoints()
    fit(StopRequest(), checkpoints, steps=4, every=2)
    assert checkpoints.saved == [(1, False), (2, True), (3, False), (4, True)]


def test_metrics_of_steps_not_yet_logged_outlive_the_process():
    values = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)

    def add(meter, steps):
        for loss, norm in values.T[steps]:
            meter.add(1, {"loss": jnp.float32([loss]), "update_norm": jnp.float32([norm])})
        meter.sync()
        return meter

    whole = add(loop.Meter(1, step=0, seconds=0.0), slice(5)).take()
    first = add(loop.Meter(1, step=0, seconds=0.0), slice(3))
    unlogged = json.loads(json.dumps(first.unlogged))
    assert {name: len(steps) for name, steps in unlogged.items()} == {"loss": 3, "update_norm": 3}
    second = add(loop.Meter(1, step=3, seconds=0.0, unlogged=unlogged), slice(3, 5))
    found = second.take()
    assert [found[name] for name in unlogged] == [whole[name] for name in unlogged]
    assert second.unlogged == {}


def test_a_failed_write_ends_the_run_at_the_next_call():
    checkpoints = Checkpoints(failing=True)
    with pytest.raises(UserError, match="the disk is full"):
        fit(StopRequest(), checkpoints)
    assert checkpoints.saved == [(1, False)]


def test_asked_to_stop_during_an_evaluation_it_saves_that_too():
    def evaluate(state):
        for _ in range(2):  # as schedulers do
            os.kill(os.getpid(), signal.SIGTERM)
        return {"accuracy": 0.5}

    stop, checkpoints = StopRequest(), Checkpoints(busy=100)
    assert fit(stop, checkpoints, every=3, seconds=60.0, evaluate=evaluate) == 3
    assert checkpoints.saved == [(3, True)]
    assert stop.signal == signal.SIGTERM


def test_a_second_ctrl_c_interrupts_and_the_handlers_are_put_back():
    previous = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def evaluate(state):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(StopRequest(), Checkpoints(), every=1, evaluate=evaluate)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == previous


def test_during_the_first_call_a_signal_has_its_effect_at_once():
    """It compiles, and there is nothing to save."""
    calls = []

    def run_steps(state, arrays, indices, count):
        calls.append(count)
        os.kill(os.getpid(), signal.SIGTERM)
        return state.replace(step=state.step + 1), {"loss": jnp.ones(1), "update_norm": jnp.ones(1)}

    def leave(number, frame):
        raise InterruptedError

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(InterruptedError):
            fit(StopRequest(), Checkpoints(), run_steps=run_steps)
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert calls == [1]


@pytest.mark.parametrize(("step_seconds", "most"), [(0.01, 50), (0.5, 2), (3.0, 1)])
def test_a_call_takes_about_a_second_on_a_device_that_is_not_waited_for(monkeypatch, step_seconds, most):
    """It works through calls in turn; the host dispatches each in a millisecond, and logs every 50 steps."""
    now = free_at = 1000.0

    class Later:
        """The metrics of a call, which are there at some time."""

        def __init__(self, at, count):
            self.at, self.count = at, count

        def block_until_ready(self):
            nonlocal now
            now = max(now, self.at)
            return self

        def __array__(self, dtype=None, copy=None):
            self.block_until_ready()
            return np.ones(self.count, np.float32)

    calls = []

    def run_steps(state, arrays, indices, count):
        nonlocal now, free_at
        calls.append(count)
        now += 0.001
        free_at = max(now, free_at) + count * step_seconds
        state = state.replace(step=state.step + count)
        return state, {"loss": Later(free_at, count), "update_norm": Later(free_at, count)}

    monkeypatch.setattr(loop.time, "monotonic", lambda: now)
    fit(StopRequest(), Checkpoints(), run_steps=run_steps, steps=200, seconds=1e9, at_once=64, log_every=50)
    assert sum(calls) == 200 and max(calls) == most
    assert len(calls) <= 200 / most + 3 + 200 / 50  # few shorter ones: at the start, and around each log


LEAVING = """
import hashlib
from simclr_jax.interrupt import leaving

with leaving("left"):
    print("entered", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)  # minutes without a look at signals
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_elsewhere_a_signal_ends_the_process_at_once_with_a_line(number, status):
    process = subprocess.Popen([sys.executable, "-c", LEAVING], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "entered\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=20)
    assert (process.returncode, output) == (status, "left\n")


def test_what_leaving_sets_up_is_put_back():
    def set_up():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), threading.active_count()

    before = set_up()
    with interrupt.leaving("left"):
        assert all(now != then for now, then in zip(set_up(), before, strict=True))
    assert set_up() == before
    assert signal.set_wakeup_fd(-1) == -1
