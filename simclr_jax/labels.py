"""Which images of a labelled data set a run may learn the labels of."""

import numpy as np


def draw(
    labels: np.ndarray, class_names: tuple[str, ...], *, fraction: float, per_class: int, seed: int
) -> np.ndarray:
    """Draws the same share of each class, or as many images of each.

    Of one seed, a smaller draw is part of every larger one.

    Args:
      labels: int [N], -1 where an image has none.
      class_names: C names.
      fraction: share of each class's images, above 0 and at most 1, rounded to whole images; not used
        with `per_class`.
      per_class: above 0, as many images of each class.
      seed: of the draw.

    Returns:
      int32 [n], rows in ascending order.

    Raises:
      ValueError: naming a class of which no image would be left, or that has fewer than `per_class`.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    bounds = np.searchsorted(labels[order], np.arange(len(class_names) + 1))
    chosen = []
    for name, first, end in zip(class_names, bounds[:-1], bounds[1:], strict=True):
        rows = order[first:end]
        count = per_class or round(fraction * len(rows))
        if count > len(rows):
            raise ValueError(f"class {name} has {len(rows)} labelled images, {count} are asked for")
        if count == 0:
            raise ValueError(f"a share of {fraction:g} of the {len(rows)} images of class {name} is none")
        chosen.append(rows[:count])
    return np.sort(np.concatenate(chosen)).astype(np.int32)
