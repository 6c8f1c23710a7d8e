"""A process of its own that holds an object, whose methods are called from here."""

import contextlib
import importlib
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, Self

_PATIENCE_SECONDS = 20  # for what a process is computing; then it is killed


class WorkerError(Exception):
    """What went wrong in the process, as a traceback, or that it was killed."""


class Worker:
    """A process that makes an object and calls its methods; used as a context, at whose end it ends.

    Where the context is left by an exception, such as Ctrl-C, it does not go on with what it was asked.
    Ctrl-C itself does not reach it, nor the processes that it starts.
    """

    def __init__(self, module: str, name: str, *arguments: Any):
        """Starts the process; `name` of `module`, which is imported there alone, makes the object."""
        context = multiprocessing.get_context("spawn")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, module, name, arguments))
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which the process inherits
        try:
            self._process.start()
        finally:
            signal.signal(signal.SIGINT, before)
        there.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        """What the method returns.

        Raises:
          WorkerError: if it, or the making of the object, fails, or the process is killed.
        """
        self.send(method, *arguments)
        return self.answer()

    def send(self, method: str, *arguments: Any) -> None:
        """The first half of `ask`: the process begins, and nobody waits for it."""
        with self._alive():
            self._connection.send((method, arguments))

    def answer(self) -> Any:
        """The second half of `ask`."""
        with self._alive():
            failed, found = self._connection.recv()
        if failed:
            raise WorkerError(found)
        return found

    @contextlib.contextmanager
    def _alive(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError) as error:
            raise WorkerError("its process was killed, as for want of memory") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._process.terminate()
        self._connection.close()
        self._process.join(_PATIENCE_SECONDS if kind is not None else None)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _work(connection: Connection, module: str, name: str, arguments: tuple[Any, ...]) -> None:
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit()
    )  # its own processes and their locks end in good order
    made: list[Any] = []
    with contextlib.suppress(EOFError, BrokenPipeError):  # the first process is done with this one
        while True:
            method, given = connection.recv()
            try:
                if not made:
                    made.append(getattr(importlib.import_module(module), name)(*arguments))
                answer = False, getattr(made[0], method)(*given)
            except Exception:
                answer = True, traceback.format_exc()
            connection.send(answer)
