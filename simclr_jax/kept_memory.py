"""The memory that a CPU's programs take for their maps, kept from one call to the next.

XLA asks for it in every call, and glibc has the system map it anew each time: for configs/cifar10_cpu.py
19,000 pages, whose first touch is a seventh of a step. It imports no JAX, which PyTorch's processes are
without.
"""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # as glibc's malloc.h numbers them
_NEVER, _NONE = -1, 0


def by_jax() -> None:
    """As `keep_freed`, for programs of JAX; comes before anything that asks it for its devices.

    Only the main thread can keep pieces of more than 64 MB, so that it has to run the programs itself. A call
    then returns when it has ended, which costs 2 ms where the next would have been prepared meanwhile, and
    gains 6 to 14 % of a step from 100 MB on.
    """
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    keep_freed()


def keep_freed() -> None:
    """Memory that is freed stays with this process, on Linux with glibc; elsewhere nothing is changed."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    set_option = getattr(libc, "mallopt", None)  # musl, for one, has no such function
    if set_option is not None:
        set_option(_MMAP_MAX, _NONE)
        set_option(_TRIM_THRESHOLD, _NEVER)
