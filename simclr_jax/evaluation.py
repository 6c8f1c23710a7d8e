"""What an encoder's embeddings are worth: 1-NN on a labelled set."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from simclr_jax import augment, neighbors
from simclr_jax.data.pack import Pack
from simclr_jax.errors import UserError


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
        """Raises `UserError` unless both packs are labelled with the same classes."""
        for pack in self:
            if not pack.class_names or (pack.label < 0).any():
                raise UserError(
                    f"{pack.name} has images without labels; set --config.evaluation.dataset and its "
                    "splits to a labelled data set"
                )


def embed(
    encode: Callable[[jax.Array], jax.Array],
    pack: Pack,
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
) -> np.ndarray:
    """Embeddings of a pack's images, each cut to its central square and resized.

    Args:
      encode: compiled function of float32 [batch_size, size, size, 3] to [batch_size, F].
      pack: N images.
      size: pixels.
      mean: normalisation, as in training.
      std: normalisation, as in training.
      batch_size: images at once.

    Returns:
      float32 [N, F].
    """
    view = jax.jit(
        jax.vmap(lambda canvas, extent: augment.center_view(canvas, extent, size=size, mean=mean, std=std))
    )
    parts = []
    for start in range(0, len(pack), batch_size):
        # The last batch is filled up with repetitions, so that it needs no compilation of its own.
        rows = np.minimum(np.arange(start, start + batch_size), len(pack) - 1)
        parts.append(encode(view(pack.canvas[rows], pack.extent[rows])))
    return np.concatenate(jax.device_get(parts))[: len(pack)]


def one_nn_accuracy(
    encode: Callable[[jax.Array], jax.Array],
    images: EvaluationSet,
    *,
    size: int,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
    batch_size: int,
    metric: str,
) -> float:
    """Share of queries whose nearest neighbour in the bank has their label, in [0, 1].

    Args:
      encode: as in `embed`.
      images: bank and queries.
      size: as in `embed`.
      mean: as in `embed`.
      std: as in `embed`.
      batch_size: as in `embed`.
      metric: `"cosine"` or `"euclidean"`.
    """
    bank, queries = (
        embed(encode, pack, size=size, mean=mean, std=std, batch_size=batch_size) for pack in images
    )
    return neighbors.one_nn_accuracy(queries, images.queries.label, bank, images.bank.label, metric=metric)


def raw_pixels(images: jax.Array) -> jax.Array:
    """The embedding that is none: float [N, H, W, 3] to [N, H * W * 3]."""
    return jnp.reshape(images, (len(images), -1))
