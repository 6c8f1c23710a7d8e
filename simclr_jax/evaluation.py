"""Labelled images, and what an encoder makes of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError

MakeViews = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(rows of the pack [B], canvas uint8 [B, S, S, 3], extent int32 [B, 2]) to float [B, size, size, 3]."""


class EvaluationSet(NamedTuple):
    """Labelled images to search in, and labelled images to classify."""

    bank: Pack
    queries: Pack

    def __str__(self) -> str:
        return (
            f"{self.queries.name} ({len(self.queries):,} queries against the {len(self.bank):,} of "
            f"{self.bank.name})"
        )

    def check(self) -> None:
        """Raises `UserError` unless both packs are labelled, and all that is asked can be learned."""
        for pack in self:
            check_labelled(pack)
        if self.bank.class_names != self.queries.class_names:
            raise UserError(f"{self.bank.name} and {self.queries.name} have different classes")
        absent = np.setdiff1d(self.queries.label, self.bank.label)
        if len(absent):
            raise UserError(
                f"class {self.bank.class_names[absent[0]]} of {self.queries.name} has no example in "
                f"{self.bank.name}; choose a larger bank split"
            )


def check_labelled(pack: Pack) -> None:
    """Raises `UserError` unless every image has a label."""
    if not pack.class_names or (pack.label < 0).any():
        raise UserError(
            f"{pack.name} has images without labels; choose a labelled data set and split to evaluate on"
        )


def embed(encode: Callable[[jax.Array], Any], pack: Pack, make_views: MakeViews, *, batch_size: int) -> Any:
    """Embeddings of a pack's images.

    Args:
      encode: compiled function of float32 [batch_size, size, size, 3] to [batch_size, F], or to a dict or
        other tree of such arrays.
      pack: N images.
      make_views: what the encoder sees of the images.
      batch_size: images at once.

    Returns:
      float32 [N, F], or a tree of such arrays, in NumPy.
    """
    view = jax.jit(make_views)
    parts = []
    for start in range(0, len(pack), batch_size):
        # The last batch is filled up with repetitions, so that it needs no compilation of its own.
        rows = np.minimum(np.arange(start, start + batch_size), len(pack) - 1)
        parts.append(jax.device_get(encode(view(rows, pack.canvas[rows], pack.extent[rows]))))
    return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(pack)], *parts)


def raw_pixels(images: jax.Array) -> jax.Array:
    """The embedding that is none: float [N, H, W, 3] to [N, H * W * 3]."""
    return jnp.reshape(images, (len(images), -1))
