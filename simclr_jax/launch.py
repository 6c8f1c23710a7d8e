"""The command line of the stages: their flags, joining other processes, the last lines of a run."""

import sys
from collections.abc import Callable, Mapping
from typing import Any

from absl import flags
from ml_collections import config_flags

from simclr_jax import command, hosts, loop, paths
from simclr_jax.errors import UserError
from simclr_jax.interrupt import StopRequest, exit_status, leaving
from simclr_jax.logs import say

USAGE = """
--dry-run compiles the step, tells its parameters, FLOPs and memory, and exits.

--profile leaves a trace of some calls of the step, after a warm-up, in the run's folder, for TensorBoard.

On several hosts, the same command on each, with --distributed and a --workdir that all of them see, trains as
on one machine with all their devices; the first process writes and prints. On TPU pods, under SLURM and on
Kubernetes they find each other; elsewhere

    --coordinator=HOST:PORT    host of process 0, and a port that is free there
    --processes=N              how many there are
    --process=I                which of them this one is, from 0 on
"""


def pace(result: Mapping[str, Any]) -> str:
    """How long a run took."""
    speed = result["images_per_second"]
    return f"{result['steps']} steps in {result['seconds']:.0f} s on {result['device']}" + (
        f", {speed:,.0f} images/s" if speed else ""
    )


def classifier_report(result: Mapping[str, Any]) -> str:
    """The last lines of a run that ends with a classifier."""
    names = {
        "top1_accuracy_before": "top-1 before",
        "top1_accuracy_teacher": "top-1, teacher",
        "top1_accuracy": "top-1",
        "top5_accuracy": "top-5",
    }
    lines = [f"  {text:<14}  {result[name]:6.1%}" for name, text in names.items() if name in result]
    heading = f"accuracy on {result['accuracy_data']}, from {result['labels']:,} labels:"
    return "\n".join([pace(result), heading, *lines])


def define_flags() -> flags.FlagValues:
    """The flags of an entry that runs a stage."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "Recipe of the run.", lock_config=True, flag_values=values
    )
    flags.DEFINE_string("workdir", None, "Folder of the run.", flag_values=values)
    flags.DEFINE_boolean("dry-run", False, "Compile the step, tell what it takes, exit.", flag_values=values)
    flags.DEFINE_boolean("profile", False, "Leave a trace in the run's folder.", flag_values=values)
    flags.DEFINE_boolean("distributed", False, "One run of several processes.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.", flag_values=values)
    flags.DEFINE_integer("processes", None, "How many there are.", flag_values=values)
    flags.DEFINE_integer("process", None, "Which of them this is.", flag_values=values)
    return values


def main(
    values: flags.FlagValues, train: Callable[..., dict[str, Any] | None], report: Callable[[dict], str]
) -> int:
    """The command line of a stage; returns the exit status.

    Args:
      values: of `define_flags`, parsed.
      train: (settings, workdir, stop, dry_run=, profile=) to the result.
      report: the last lines of a run, from its result.
    """
    file = command.config_file(values)
    by_hand = [values[name].value for name in ("coordinator", "processes", "process")]
    if values["distributed"].value:
        hosts.join(*by_hand)
    elif any(value is not None for value in by_hand):
        raise UserError("--coordinator, --processes and --process go with --distributed; set it too")
    dry_run, profile = values["dry-run"].value, values["profile"].value
    if dry_run and profile:
        raise UserError("--dry-run takes no step that --profile could trace; leave one of them out")
    workdir = paths.parse(values["workdir"].value or f"runs/{file.stem}")
    stop = StopRequest()
    try:
        with leaving("stopped, with nothing to save; the same command goes on"):
            result = train(values["config"].value, workdir, stop, dry_run=dry_run, profile=profile)
    except loop.NotFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if result is None:
        if not dry_run:
            say("the same command goes on from there")
        return exit_status(stop.signal)
    say(report(result))
    return 0
