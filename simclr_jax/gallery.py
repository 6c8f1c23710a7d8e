"""Queries and their nearest neighbours as one picture."""

from collections.abc import Sequence

import numpy as np
from jax.typing import ArrayLike

from simclr_jax.sheet import Block, Row, contact_sheet

# Told apart by the colour-blind too: Wong 2011, "Points of view: Color blindness", Nature Methods 8.
_RIGHT, _WRONG = (0, 158, 115), (213, 94, 0)


def gallery(
    queries: Sequence[ArrayLike] | np.ndarray,
    neighbours: Sequence[Sequence[ArrayLike]] | np.ndarray,
    query_captions: Sequence[str],
    neighbour_captions: Sequence[Sequence[str]],
    right: ArrayLike,
    *,
    title: str,
) -> np.ndarray:
    """Lay out queries, each with its neighbours at its right, marked as right or wrong.

    A right neighbour has a green frame and "=" before its caption, a wrong one a red frame and "x".

    Args:
      queries: the Q images, each uint8 or float in [0, 1], [H, W, 3]; sizes may differ.
      neighbours: for each query its K nearest images, the nearest first.
      query_captions: Q texts left of the queries; lines after the first are set smaller.
      neighbour_captions: for each neighbour a short line below it, such as its class and distance.
      right: bool [Q, K], whether a neighbour is of its query's class.
      title: above them all; may be empty, lines after the first are set smaller.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: if the numbers of images, captions and marks differ, there is no query, or an image has
        another shape or type.
    """
    marks = np.asarray(right)
    if marks.ndim != 2 or marks.dtype != bool or len(marks) == 0:
        raise ValueError(f"right is {marks.dtype} of shape {marks.shape}; expected bool [Q, K] with Q >= 1")
    for name, values in (
        ("queries", queries),
        ("neighbours", neighbours),
        ("query_captions", query_captions),
        ("neighbour_captions", neighbour_captions),
    ):
        if len(values) != len(marks):
            raise ValueError(f"{name} has {len(values)} entries; expected {len(marks)}, the rows of right")
    parts = zip(queries, neighbours, query_captions, neighbour_captions, marks, strict=True)
    return contact_sheet([Block(title, [_row(*part) for part in parts])])


def _row(
    query: ArrayLike, images: Sequence[ArrayLike], label: str, captions: Sequence[str], marks: np.ndarray
) -> Row:
    if not len(images) == len(captions) == len(marks):
        counts = f"{len(images)} neighbours, {len(captions)} captions and {len(marks)} marks"
        raise ValueError(f"the query {label!r} has {counts}")
    texts = [f"{'=' if mark else 'x'} {caption}" for mark, caption in zip(marks, captions, strict=True)]
    frames = [_RIGHT if mark else _WRONG for mark in marks]
    return Row(label, [query, *images], ["query", *texts], [None, *frames])
