"""Several processes as one run: how they join, what they agree on, arrays on the devices of all of them.

Each process runs the same program on the devices of its host. A single process is the case of one: nothing
here then waits for anything.
"""

import contextlib
import os
import socket
import time
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# The coordinator's key-value store has no public name; Orbax uses it by this one too.
from jax._src import distributed

from simclr_jax.errors import UserError

_REACH_SECONDS = 300  # as long as JAX waits for the others
_DAY_MS = 24 * 3600 * 1000  # one host may be packing its images; a process that dies is noticed in any case


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to the others of its run; comes before anything that asks JAX for its devices.

    Without arguments `jax.distributed` finds the others itself: on TPU pods, under SLURM, Open MPI and
    Kubernetes.

    Args:
      coordinator: "HOST:PORT" of process 0, on a port that is free there.
      processes: how many there are in all, at least 1.
      process: which of them this is, from 0 on.

    Raises:
      UserError: for values that do not fit, or where the others are not found.
    """
    by_hand = (coordinator, processes, process)
    if any(value is not None for value in by_hand):
        if coordinator is None or processes is None or process is None:
            raise UserError("--coordinator, --processes and --process go together; set all three or none")
        if not 0 <= process < processes:
            raise UserError(
                f"--process is {process} of --processes={processes}; number the processes from 0 to "
                f"{max(0, processes - 1)}"
            )
        _check_reachable(coordinator, listens=process == 0)
    # It would take SIGTERM, with which schedulers ask a run to stop, away from the loop.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # A process that fails alone waits for the others before it leaves, by default for 5 minutes.
        jax.distributed.initialize(coordinator, processes, process, shutdown_timeout_seconds=60)
    except (ValueError, KeyError) as error:  # from JAX, where there is nothing to ask
        if coordinator is not None:
            raise
        raise UserError(
            "--distributed found no TPU pod, SLURM or Kubernetes job to join; name the processes with "
            "--coordinator=HOST:PORT --processes=N --process=I"
        ) from error


def _check_reachable(coordinator: str, *, listens: bool) -> None:
    """Raises `UserError` for an address that the process that `listens` cannot take, or others not reach.

    JAX itself would end the process with a stack trace of C++.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator is {coordinator!r}; it must be HOST:PORT, such as 10.0.0.1:1234")
    if listens:
        try:
            socket.create_server(("", int(port))).close()
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise UserError(f"--coordinator {coordinator}: {reason}; choose another port") from error
        return
    until = time.monotonic() + _REACH_SECONDS
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise UserError(
                    f"--coordinator {coordinator} was not reached for {_REACH_SECONDS} s ({error}); check "
                    "the address, and that --process=0 was started on that host"
                ) from error
        time.sleep(0.1)


def is_first() -> bool:
    """Whether this process is the one that writes and prints for all; asks for no device."""
    return distributed.global_state.process_id == 0


def agree(values: Sequence[int]) -> list[int]:
    """The greatest of each value over all processes, which all have to call this.

    It goes through the coordinator and not through the devices, where it would wait for the steps that
    have been dispatched: 2 ms between two processes of one machine.

    Args:
      values: a few integers, as many in every process.

    Returns:
      As many; of a single process its own.
    """
    client = distributed.global_state.client
    if client is None:
        return [int(value) for value in values]
    client.key_value_set(
        f"simclr_jax/agree/{distributed.global_state.process_id}",
        " ".join(str(int(value)) for value in values),
        allow_overwrite=True,
    )
    client.wait_at_barrier("simclr_jax/agree: written", _DAY_MS)
    found = client.key_value_dir_get("simclr_jax/agree/")
    client.wait_at_barrier("simclr_jax/agree: read", _DAY_MS)
    of_processes = [[int(word) for word in text.split()] for _, text in found]
    return [max(column) for column in zip(*of_processes, strict=True)]


@contextlib.contextmanager
def together() -> Iterator[None]:
    """All processes leave the body, or all of them with an error.

    The body must not wait for other processes.

    Raises:
      UserError: where the body went well here and failed in another process.
    """
    try:
        yield
    except Exception:
        agree([True])
        raise
    if agree([False])[0]:
        raise UserError("another process of this run has failed; it says why")


def same(text: str) -> bool:
    """Whether all processes, each of which has to call this, give the same `text`."""
    number = zlib.crc32(text.encode())
    highest, lowest = agree([number, -number])
    return highest == -lowest


def put(tree: Any, sharding: jax.sharding.Sharding) -> Any:
    """`jax.device_put` for a sharding whose devices may be those of several processes.

    Args:
      tree: arrays whose values are the same in every process, which is not checked: the check of
        `device_put` would send all of them around. Keys of `jax.random` are arrays too.
      sharding: of every array.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(array: Any) -> jax.Array:
        if not jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(place, tree)


def local(tree: Any) -> Any:
    """Arrays that are the same on every device, as they are on this process's first one.

    What is computed from them involves no other device, and so no other process.
    """
    return jax.tree.map(lambda array: array.addressable_data(0), tree)
