"""Checkpoints of a run, with Orbax; the only file that knows its names."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from simclr_jax import hosts
from simclr_jax.errors import UserError, disk_trouble

_logger = logging.getLogger("simclr_jax")


def finished_steps(folder: pathlib.Path) -> list[int]:
    """Steps of the finished checkpoints in `folder`, ascending; changes nothing, so a run may be writing."""
    if not folder.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder.absolute()))


def load_weights(folder: pathlib.Path, step: int, params: Any, batch_stats: Any) -> tuple[Any, Any]:
    """Parameters and running statistics of a checkpoint, without the rest of the state.

    Args:
      folder: as in `Checkpoints`.
      step: one of `finished_steps`.
      params: a dict with some modules of the model, such as `encoder`, each of the same structure as in the
        checkpoint; the result has their shapes, dtypes and shardings.
      batch_stats: likewise.

    Raises:
      UserError: if the checkpoint is damaged; or for the first parameter that a module has only here or only
        there, or in another shape.
    """
    place = folder.absolute() / str(step)
    process = jax.process_index()  # reads alone; Orbax would have all processes of a run read together
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    with _readable(folder, step), ocp.Context(multiprocessing_options=alone):
        stored: Any = ocp.checkpointables_metadata(str(place)).metadata["state"]
    # Of a damaged checkpoint there is nothing to compare, and loading tells what is wrong with it.
    difference = stored and _difference(
        _shapes(params, params) | _shapes(batch_stats, batch_stats),
        _shapes(stored["params"], params) | _shapes(stored.get("batch_stats") or {}, batch_stats),
        f"{folder / str(step)}",
    )
    if difference:
        raise UserError(difference)
    # Orbax takes an empty dict for a leaf: an encoder with GroupNorm has no statistics.
    kinds = {"params": params, "batch_stats": batch_stats}
    wanted = {kind: {name: tree for name, tree in trees.items() if tree} for kind, trees in kinds.items()}
    abstract = _abstract({kind: trees for kind, trees in wanted.items() if trees})
    partly = ocp.options.PyTreeOptions(loading=ocp.options.PyTreeOptions.Loading(partial_load=True))
    with _readable(folder, step), ocp.Context(pytree_options=partly, multiprocessing_options=alone):
        weights = ocp.load_checkpointables(str(place), {"state": abstract})["state"]
    return weights["params"], weights.get("batch_stats", {})


@contextlib.contextmanager
def _readable(folder: pathlib.Path, step: int) -> Iterator[None]:
    """Turns what Orbax raises on a damaged file, nearly any type, into a `UserError`."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"the checkpoint of step {step} in {folder} cannot be read ({type(error).__name__}: "
            f"{_first_line(error)}); remove {folder / str(step)} to use the one before it"
        ) from error


class Checkpoints:
    """The checkpoints in a folder: the newest few, and the best by a metric."""

    def __init__(self, folder: pathlib.Path, *, keep: int, best_metric: str):
        """Opens `folder`, creating it if need be.

        Args:
          folder: where they lie, one subfolder a step.
          keep: how many of the newest stay.
          best_metric: the checkpoint with the highest value of it (of a `loss` or `rank`, the lowest)
            stays too.
        """
        self._folder = folder
        self._best_metric = best_metric
        self._failed = False
        policies = ocp.training.preservation_policies
        lower_is_better = best_metric.endswith(("loss", "rank"))
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()),
            # Orbax's own policies do not match its declaration of one.
            preservation_policy=policies.AnyPreservationPolicy(  # pyright: ignore[reportArgumentType]
                [
                    policies.LatestN(keep),
                    policies.BestN(
                        get_metric_fn=lambda metrics: metrics[best_metric],
                        reverse=lower_is_better,
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            ),
            cleanup_tmp_directories=True,
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest finished checkpoint, if there is one."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: Any, *, seconds: float, metrics: Mapping[str, float]) -> None:
        """Writes `state` as the checkpoint of `step`, aside first and then moved into place.

        Args:
          step: steps done.
          state: pytree of arrays.
          seconds: time trained so far, over all interruptions.
          metrics: what is known at this step; the best-metric is looked up here.

        Raises:
          UserError: if the disk is full or the folder cannot be written. Earlier checkpoints stand.
        """
        if self.latest_step == step:
            return
        known: Any = {self._best_metric: metrics[self._best_metric]} if self._best_metric in metrics else None
        try:
            self._checkpointer.save_checkpointables(
                step,
                {"state": state, "clock": {"seconds": np.float64(seconds)}},
                metrics=known,
                force=True,
            )
        except Exception as error:
            self._failed = True
            reason = disk_trouble(error)
            if reason is None:
                raise
            last = self.latest_step
            kept = "there is none before it" if last is None else f"the last good one is of step {last}"
            raise UserError(
                f"the checkpoint of step {step} could not be written to {self._folder}: {reason}; {kept}. "
                "Put it right and run the same command again"
            ) from error

    def restore(self, state: Any) -> tuple[Any, float] | None:
        """The newest readable checkpoint as (state, seconds); None where there is none.

        Args:
          state: a state of the same structure, whose shapes, dtypes and shardings the result has.

        A damaged checkpoint is named in a warning and set aside as `damaged-<step>`, and the one before
        it is tried.

        Raises:
          UserError: if there are checkpoints but none can be read.
        """
        steps = sorted((checkpoint.step for checkpoint in self._checkpointer.checkpoints), reverse=True)
        abstract = {
            "state": _abstract(state),
            "clock": {"seconds": np.float64(0)},
        }
        for step in steps:
            try:
                loaded = self._checkpointer.load_checkpointables(step, abstract)
            except Exception as error:
                reason = _first_line(error)
                _logger.warning(
                    "the checkpoint of step %d is damaged (%s: %s); set aside as damaged-%d",
                    step,
                    type(error).__name__,
                    reason,
                    step,
                )
                self._set_aside(step)
                continue
            return loaded["state"], float(loaded["clock"]["seconds"])
        if steps:
            raise UserError(
                f"none of the checkpoints in {self._folder} can be read (steps {steps}); "
                "start again in another --workdir"
            )
        return None

    def close(self) -> None:
        """Finishes what is being written; after a failed `save`, which told, there is nothing to finish."""
        if not self._failed:
            self._checkpointer.close()

    def _set_aside(self, step: int) -> None:
        source = self._folder / str(step)
        target = self._folder / f"damaged-{step}"
        if hosts.is_first() and source.exists() and not target.exists():
            source.rename(target)
        hosts.agree([0])  # so that none looks before it is renamed
        self._checkpointer.reload()


def _shapes(tree: Mapping[str, Any], modules: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by dotted names, of those top-level modules that are in `modules` too."""
    chosen = {name: tree[name] for name in modules if name in tree}
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(chosen)
    }


def _difference(wanted: Mapping[str, Any], found: Mapping[str, Any], place: str) -> str | None:
    """The first parameter or statistic that differs, by names and shapes, in a sentence."""
    for name, shape in wanted.items():
        if name not in found:
            return f"the model that the config asks for has {name}, of {shape}, and {place} has not"
        if found[name] != shape:
            return f"{name} is {found[name]} in {place}, and the config asks for {shape}"
    for name, shape in found.items():
        if name not in wanted:
            return f"{place} has {name}, of {shape}, which the model that the config asks for has not"
    return None


def _abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
