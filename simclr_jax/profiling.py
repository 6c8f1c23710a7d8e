"""A trace of some calls of a run in its folder, for TensorBoard's profiler."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Self

import jax

from simclr_jax import paths
from simclr_jax.logs import say

# The first call compiles, and only from the fifth on is a call as long as the measured speed has it.
_WARM_UP_CALLS = 4
_TRACED_CALLS = 3


class Trace:
    """While entered, the calls made under `call` are counted, and a few of them traced after a warm-up.

    The trace begins and ends with nothing under way on the device. It ends in any case: where the run does
    before its last call, it has the calls that there were.
    """

    def __init__(self, workdir: paths.Path, *, wait: Callable[[], None], resume: Callable[[], None]):
        """Traces into `workdir`, local or remote, in the layout that TensorBoard looks for.

        Args:
          workdir: the run's folder.
          wait: returns when the device has done all that it was given.
          resume: called after what took time and was not training.
        """
        self._workdir, self._wait, self._resume = workdir, wait, resume
        self._calls = 0
        self._first_step = 0
        self._running: contextlib.ExitStack | None = None  # what ends the trace

    @contextlib.contextmanager
    def call(self, step: int) -> Iterator[None]:
        """Around a call of the loop: what it takes from the host, and its steps from `step` on."""
        if self._calls == _WARM_UP_CALLS:
            self._wait()
            self._start(step)
            self._resume()
        with jax.profiler.StepTraceAnnotation("call", step_num=step):
            yield
        self._calls += 1
        if self._calls == _WARM_UP_CALLS + _TRACED_CALLS:
            self._wait()
            self._stop()
            self._resume()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._calls <= _WARM_UP_CALLS:
            say(f"no trace: it begins with call {_WARM_UP_CALLS + 1} of the step; there were {self._calls}")

    def _start(self, step: int) -> None:
        self._first_step = step
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it slows the host, which then shows as gaps on the device
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(paths.local(self._workdir))  # object storage gets it at the end
            jax.profiler.start_trace(folder, profiler_options=options)
            stack.callback(jax.profiler.stop_trace)
            self._running = stack.pop_all()

    def _stop(self) -> None:
        running, self._running = self._running, None
        if running is not None:
            running.close()
            say(
                f"traced {self._calls - _WARM_UP_CALLS} calls, from step {self._first_step} on; to look: "
                f"pip install xprof tensorboard && tensorboard --logdir {self._workdir}, under Profile"
            )
