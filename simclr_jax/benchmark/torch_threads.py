"""How many threads PyTorch is fastest with on this machine, as it is."""

import os
import time
from collections.abc import Callable

import torch  # pyright: ignore[reportMissingImports]

_TRIALS = 3


def choose(run: Callable[[], object]) -> int:
    """Sets the number of PyTorch's threads, and returns it: all cores, or a half, a quarter, ... of them.

    Its threads wait for each other after every operation. With other work on two cores, two of them took
    3.7 s for a gradient that one computed in 1.1 s, and 149 s for a fit that one made in 7.5 s; on free cores
    they took 0.6 s for that gradient.

    Args:
      run: what shall be fast; called a few times with each number.
    """
    tried: dict[int, float] = {}
    threads = os.cpu_count() or 1
    while threads:
        torch.set_num_threads(threads)
        for _ in range(_TRIALS):
            began = time.perf_counter()
            run()
            tried[threads] = min(tried.get(threads, float("inf")), time.perf_counter() - began)
        threads //= 2
    best = min(tried, key=tried.__getitem__)
    torch.set_num_threads(best)
    return best
