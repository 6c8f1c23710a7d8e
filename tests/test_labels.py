"""Which labels are drawn: equal shares, nested, of every row alike."""

import itertools

import numpy as np
import pytest

from simclr_jax import labels

CLASSES = ("cat", "dog", "fox")
SIZES = (40, 25, 60)  # and ten rows without a label


def rows_of_classes():
    counted = np.repeat([-1, 0, 1, 2], (10, *SIZES))
    return np.random.default_rng(5).permutation(counted).astype(np.int32)


def draw(fraction=1.0, per_class=0, seed=0):
    return labels.draw(rows_of_classes(), CLASSES, fraction=fraction, per_class=per_class, seed=seed)


def counts(rows):
    return np.bincount(rows_of_classes()[rows], minlength=3).tolist()


@pytest.mark.parametrize(
    ("fraction", "expected"), [(0.1, [4, 2, 6]), (0.5, [20, 12, 30]), (1.0, list(SIZES))]
)
def test_a_share_is_the_same_of_each_class(fraction, expected):
    assert counts(draw(fraction)) == expected


@pytest.mark.parametrize("per_class", [1, 7, 25])
def test_as_many_of_each_class_whatever_the_fraction(per_class):
    rows = draw(fraction=0.01, per_class=per_class)
    assert counts(rows) == [per_class] * 3
    np.testing.assert_array_equal(rows, draw(per_class=per_class))


@pytest.mark.parametrize("options", [{"fraction": 0.3}, {"per_class": 4}, {}])
def test_rows_ascend_and_have_labels(options):
    rows = draw(**options)
    assert rows.dtype == np.int32
    assert (np.diff(rows) > 0).all()
    assert (rows_of_classes()[rows] >= 0).all()


def test_all_of_it_is_every_row_with_a_label():
    np.testing.assert_array_equal(draw(), np.flatnonzero(rows_of_classes() >= 0))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_smaller_draws_of_a_seed_are_parts_of_larger_ones(seed):
    by_share = [draw(fraction=fraction, seed=seed) for fraction in (0.04, 0.1, 0.35, 0.8, 1.0)]
    by_number = [draw(per_class=number, seed=seed) for number in (1, 2, 9, 25)]
    # A tenth is 4, 2 and 6 rows: more than 2 of each class and fewer than 9.
    mixed = [by_number[1], by_share[1], by_number[2]]
    for chain in (by_share, by_number, mixed):
        for smaller, larger in itertools.pairwise(chain):
            assert set(smaller) < set(larger)


def test_the_seed_decides_the_rows():
    np.testing.assert_array_equal(draw(0.2, seed=3), draw(0.2, seed=3))
    assert set(draw(0.2, seed=3)) != set(draw(0.2, seed=4))


def test_every_row_of_a_class_is_drawn_as_often():
    drawn = np.bincount(np.concatenate([draw(per_class=5, seed=seed) for seed in range(2000)]), minlength=135)
    for label, size in enumerate(SIZES):
        expected = 2000 * 5 / size
        found = drawn[rows_of_classes() == label]
        # Six standard deviations of a binomial, of which about one row in 10^9 is farther away.
        assert np.abs(found - expected).max() < 6 * np.sqrt(expected * (1 - 5 / size))


def test_a_class_that_a_share_leaves_empty_is_named():
    with pytest.raises(ValueError, match=r"a share of 0\.01 of the 40 images of class cat is none"):
        draw(0.01)


def test_a_class_with_too_few_images_is_named():
    with pytest.raises(ValueError, match="class dog has 25 labelled images, 26 are asked for"):
        draw(per_class=26)


def test_a_class_without_images_is_named():
    for options in ({"fraction": 1.0, "per_class": 0}, {"fraction": 1.0, "per_class": 1}):
        with pytest.raises(ValueError, match="class owl"):
            labels.draw(rows_of_classes(), (*CLASSES, "owl"), seed=0, **options)
