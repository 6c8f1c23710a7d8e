"""The loop around a compiled step: calls, logging, evaluation, checkpoints, leaving in good order."""

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import jax
import numpy as np

from simclr_jax.checkpoints import Checkpoints
from simclr_jax.interrupt import StopRequest
from simclr_jax.logs import RunLog, SilentLog
from simclr_jax.training import TrainState

_CALL_SECONDS = 1.0  # a call this long hides its dispatch, and still lets a signal be answered soon


class NotFiniteError(Exception):
    """A loss or update became NaN or infinite; the message names the steps between which it did."""


class Batches(Protocol):
    """Where the steps' images come from."""

    steps_per_call: int

    def call(self, step: int, count: int) -> tuple[Any, jax.Array]:
        """Arrays and int32 [steps_per_call, B] indices of `count` steps from `step`."""
        ...


class Meter:
    """Metrics and speed of the calls since the last log, without holding up the device."""

    def __init__(
        self,
        batch_size: int,
        *,
        step: int,
        seconds: float,
        unlogged: Mapping[str, Sequence[float]] | None = None,
    ):
        """Begins at `step`, after `seconds` and with the `unlogged` metrics of earlier parts of the run."""
        self._batch_size = batch_size
        self._step = self._synced_step = step
        self._pending: list[tuple[int, Any]] = []  # (count, metrics on the device)
        self._fetched: dict[str, list[np.ndarray]] = {
            name: [np.array(values, np.float32)] for name, values in (unlogged or {}).items()
        }
        self._window = [0, 0.0]  # steps and seconds since the last log
        self._whole = [0, 0.0]  # steps and seconds of this process
        self._began = time.monotonic() - seconds
        self._resumed_at = self._ended_at = time.monotonic()
        self.step_seconds: float | None = None  # of the call that ended last
        self.latest: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far: compilation, evaluation and earlier parts included."""
        return time.monotonic() - self._began

    @property
    def images_per_second(self) -> float | None:
        """Source images a second in this process, without its first call and without pauses."""
        steps, seconds = self._whole
        return steps * self._batch_size / seconds if steps else None

    @property
    def unlogged(self) -> dict[str, list[float]]:
        """Metrics step by step from the last `take` to the last `sync`."""
        return {name: np.concatenate(parts).tolist() for name, parts in self._fetched.items()}

    def add(self, count: int, metrics: Any) -> None:
        """Notes a dispatched call, and waits for the one before it: one runs, one stands ready."""
        if self._pending:
            jax.block_until_ready(self._pending[-1][1])
            self._note_end()
        self._pending.append((count, metrics))
        self._step += count

    def sync(self, *, timed: bool = True) -> None:
        """Waits for the device and takes its metrics.

        Args:
          timed: whether the time since the last `resume` counts as training; the first call's, which
            compiles, does not.

        Raises:
          NotFiniteError: if a loss or an update norm among them is NaN or infinite.
        """
        if not self._pending:
            return
        metrics = jax.device_get([metrics for _, metrics in self._pending])
        if timed:
            self._note_end()
            elapsed = time.monotonic() - self._resumed_at
            for totals in (self._window, self._whole):
                totals[0] += self._step - self._synced_step
                totals[1] += elapsed
        for (count, _), values in zip(self._pending, metrics, strict=True):
            for name, value in values.items():
                self._fetched.setdefault(name, []).append(value[:count])
        self._pending.clear()
        for name in ("loss", "update_norm"):
            if not np.isfinite(np.concatenate(self._fetched[name])).all():
                raise NotFiniteError(
                    f"{name} became NaN or infinite between steps {self._synced_step} and {self._step}; "
                    "lower the learning rate, lengthen the warm-up or raise the temperature"
                )
        self._synced_step = self._step
        self.resume()

    def _note_end(self) -> None:
        """Of the last call added, before which the device did the one before it, or nothing."""
        now = time.monotonic()
        self.step_seconds = (now - max(self._resumed_at, self._ended_at)) / self._pending[-1][0]
        self._ended_at = now

    def resume(self) -> None:
        """Ends a pause: what happened since the last `sync` was not training."""
        self._resumed_at = time.monotonic()

    def take(self) -> dict[str, float]:
        """Means over the steps since the last `take`, and their images a second."""
        values = {
            name: float(np.concatenate(parts).mean(dtype=np.float64)) for name, parts in self._fetched.items()
        }
        steps, seconds = self._window
        if steps:
            values["images_per_second"] = steps * self._batch_size / seconds
        self._fetched.clear()
        self._window = [0, 0.0]
        self.latest |= values
        return values


def fit(
    state: TrainState,
    *,
    total_steps: int,
    batches: Batches,
    run_steps: Callable[[TrainState, Any, jax.Array, int], tuple[TrainState, Any]],
    evaluate: Callable[[TrainState], dict[str, float]],
    evaluate_every_steps: int,
    log_every_steps: int,
    checkpoint_seconds: float,
    meter: Meter,
    log: RunLog | SilentLog,
    checkpoints: Checkpoints,
    stop: StopRequest,
    agree: Callable[[Sequence[int]], Sequence[int]] = list,
    around_call: Callable[[int], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> TrainState:
    """Runs from `state` to `total_steps`, or until `stop` is set; saves before it returns.

    Where calls begin and end follows the measured speed, and changes nothing in the result.

    Args:
      state: state to go on from; donated.
      total_steps: steps of the whole run.
      batches: where a call's arrays come from.
      run_steps: (state, arrays, indices, count) to (state, metrics [steps_per_call]).
      evaluate: metrics of a state, such as its 1-NN accuracy; run at the end of the run as well.
      evaluate_every_steps: 0 for only at the end.
      log_every_steps: metrics are averaged over as many steps and written.
      checkpoint_seconds: a checkpoint is due after this long, and once the one before it is in place.
      meter: takes the metrics.
      log: receives metrics and progress.
      checkpoints: receives states.
      stop: looked at after each call.
      agree: the greatest of some integers over all processes of the run, as `hosts.agree`; asked once a call
        about what clocks and signals say, so that all processes dispatch the same programs.
      around_call: of a call's first step to a context in which the call is made, such as `Trace.call`.

    Returns:
      The state reached.

    Raises:
      NotFiniteError: after a loss or update that is not finite; nothing of it is saved.
      UserError: if a checkpoint cannot be written.
    """
    step = int(state.step)
    first_step = step
    saved_at = time.monotonic()
    call_steps = 1
    (stopping,) = agree([bool(stop)])
    log.progress(step, meter.latest)

    while step < total_steps and not stopping:
        milestones = _milestones(step, log_every_steps, evaluate_every_steps)
        count = min(call_steps, min(total_steps, *milestones) - step)
        with around_call(step):
            arrays, indices = batches.call(step, count)
            # The first call compiles, for up to minutes, and all that a kill would lose is this call.
            with stop.paused() if step == first_step else contextlib.nullcontext():
                state, metrics = run_steps(state, arrays, indices, count)
            meter.add(count, metrics)
        if step == first_step:
            meter.sync(timed=False)
        step += count

        if step % log_every_steps == 0 or step == total_steps:
            meter.sync()
            log.metrics(step, meter.take())
        log.progress(step, meter.latest)

        evaluated = step == total_steps or (evaluate_every_steps > 0 and step % evaluate_every_steps == 0)
        known = dict(meter.latest)
        if evaluated:
            meter.sync()
            known |= evaluate(state)  # of this step only, so not among the latest
        checkpoints.raise_if_failed()
        due = time.monotonic() - saved_at >= checkpoint_seconds and not checkpoints.writing
        if meter.step_seconds is not None:
            wanted = _CALL_SECONDS / max(meter.step_seconds, 1e-6)
            call_steps = int(np.clip(wanted, 1, batches.steps_per_call))
        # Looked at once, so that what ends the loop has been saved.
        call_steps, stopping, due = agree([call_steps, bool(stop), due])
        if evaluated or stopping or due:
            meter.sync()
            log.sync()  # first, so that a checkpoint never lacks what was logged before it
            checkpoints.save(step, state, seconds=meter.seconds, metrics=known, unlogged=meter.unlogged)
            saved_at = time.monotonic()
            meter.resume()
    checkpoints.wait()
    return state


def _milestones(step: int, *intervals: int) -> Iterable[int]:
    """The next multiple of each interval after `step`; of 0 there is none."""
    return [(step // interval + 1) * interval for interval in intervals if interval]
