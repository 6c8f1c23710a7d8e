"""A process of its own that holds an object, whose methods are called from here."""

import contextlib
import importlib
import math
import multiprocessing
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from typing import Any, Self

_PATIENCE_SECONDS = 20  # for what a process is computing; then it is killed


class WorkerError(Exception):
    """What went wrong in the process, as a traceback, or that it was killed.

    Attributes:
      reason: the same in one line.
    """

    def __init__(self, text: str, reason: str = ""):
        """Of one line alone, `reason` is that."""
        super().__init__(text)
        self.reason = reason or text


def reason(error: BaseException) -> str:
    """An error in one line: its type, and the first line of its message."""
    return traceback.format_exception_only(error)[0].splitlines()[0]


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
            raise WorkerError(*found)
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
            self.end()
        self._connection.close()
        self._process.join()

    def end(self) -> None:
        """Ends the process, whatever it does; what it holds is free afterwards."""
        self._process.terminate()
        self._process.join(_PATIENCE_SECONDS)
        if self._process.is_alive():
            self._process.kill()


class Group:
    """Workers that are asked in turns: who fails once is ended, and asked no more.

    Attributes:
      failed: by name, how.
    """

    def __init__(self, workers: Mapping[str, Worker]):
        """Of running workers, by name."""
        self._workers, self.failed = workers, dict[str, WorkerError]()

    def ask(self, name: str, method: str, *arguments: Any) -> Any:
        """What the method of one of them returns; None of one that fails, or has failed."""
        if name in self.failed:
            return None
        try:
            return self._workers[name].ask(method, *arguments)
        except WorkerError as error:
            self.failed[name] = error
            self._workers[name].end()
            return None

    def time(self, name: str, *arguments: Any) -> float:
        """Of its method `time`, which returns seconds; NaN where `ask` has None."""
        seconds = self.ask(name, "time", *arguments)
        return math.nan if seconds is None else seconds

    def not_run(self, name: str) -> dict[str, str]:
        """How one of `failed` did, for JSON: why, in a line, and the traceback."""
        error = self.failed[name]
        return {"not_run": error.reason, "traceback": str(error)}


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
            except Exception as error:
                answer = True, (traceback.format_exc(), reason(error))
            connection.send(answer)
