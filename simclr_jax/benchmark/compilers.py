"""Compilers for accelerators that are not there, each in a process of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any


class CompilerError(Exception):
    """A compiler failed; the message ends with the last line of what it said."""


def apart(module: str, arguments: Sequence[str], environment: Mapping[str, str], *, name: str) -> Any:
    """Runs a module that compiles in a process of its own.

    Args:
      module: prints JSON as its last line.
      arguments: of its command line.
      environment: what its environment has beside this one's.
      name: of what it compiles for, for the error.

    Returns:
      What it printed, parsed.

    Raises:
      CompilerError: if the process fails.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        # Otherwise the last line is one of JAX's about its tracebacks.
        env={**os.environ, "JAX_TRACEBACK_FILTERING": "off", **environment},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CompilerError(f"the compiler for the {name} failed: {said[-1]}")
    return json.loads(done.stdout.splitlines()[-1])
