"""What a function takes of memory at most, told by the system, and a fresh process to measure it in."""

import ctypes
import multiprocessing
import pathlib
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

_PROCESS = pathlib.Path("/proc/self")


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` of `arguments` returns in a process of its own; it and they are pickled.

    Raises:
      BrokenProcessPool: if the process is killed, as it is where the system has too little memory.
      Exception: what `function` raises.
    """
    spawn = multiprocessing.get_context("spawn")  # a fork would have the peak, and the threads, of this one
    # At Ctrl-C it shall end as well, without a traceback of its own.
    quietly = (signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(1, spawn, initializer=signal.signal, initargs=quietly) as process:
        return process.submit(function, *arguments).result()


def of_call(function: Callable[[], object]) -> int | None:
    """Calls `function` and tells the bytes that it took at most.

    Returns:
      On a CPU by how much the resident set grew, as `resident`; else the peak of the device's memory in this
      process, of the fullest one, arguments included. None where the system, or the device, does not tell.
    """
    import jax  # not before: PyTorch's processes are without it

    if jax.default_backend() == "cpu":
        return resident(function)
    function()
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return max((peak for peak in peaks if peak is not None), default=None)


def resident(function: Callable[[], object]) -> int | None:
    """By how many bytes the resident set of this process grows at most while `function` runs.

    Returns:
      None where Linux's /proc, which tells, is not there; `function` is then not called.
    """

    def peak() -> int:
        lines = (_PROCESS / "status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

    try:
        peak()
        # What was freed and not given back could be taken again unseen. musl, for one, has no such function.
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(0)
        (_PROCESS / "clear_refs").write_text("5")  # the peak is what it is now
        before = peak()
    except (OSError, StopIteration):
        return None
    function()
    return peak() - before
