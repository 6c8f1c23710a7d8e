import numpy as np
import pytest

from simclr_jax.gallery import gallery
from simclr_jax.sheet import Block, Row, contact_sheet

GREEN, RED = (0, 158, 115), (213, 94, 0)


def images(*shape, seed=0):
    """Gray images, so that only frames are coloured."""
    gray = np.random.default_rng(seed).integers(0, 200, (*shape, 1), np.uint8)
    return gray.repeat(3, -1)


def picture(right, *, title="Neighbours", mark=""):
    right = np.array(right)
    queries, count = images(len(right), 32, 32), right.shape[1]
    neighbours = images(len(right), count, 32, 32, seed=1)
    captions = [[f"{mark}cat 0.12"] * count] * len(right)
    return gallery(queries, neighbours, ["cat\nimage 3"] * len(right), captions, right, title=title)


def places(shown, colour):
    """Where a colour is, [N, 2]."""
    return np.argwhere((shown == colour).all(-1))


def test_right_and_wrong_neighbours_have_frames_of_their_colour_in_order():
    shown = picture([[True, False, True], [False, False, False]])
    assert shown.dtype == np.uint8
    side = 4 * 32 + 2 * 4
    area = side**2 - (side - 8) ** 2
    green, red = places(shown, GREEN), places(shown, RED)
    assert (len(green), len(red)) == (2 * area, 4 * area)
    first, second = (
        np.unique(green[:, 1][half]) for half in (green[:, 1] < np.mean(green[:, 1]), slice(None))
    )
    assert len(first) == side and len(second) == 2 * side
    left = np.unique(red[red[:, 0] <= green[:, 0].max()][:, 1])
    assert first.max() < left.min() and left.max() < second.max()  # right, wrong, right in the first row
    assert len(np.unique(red[:, 0])) == 2 * side


def test_right_and_wrong_are_told_apart_without_colour():
    gray = [picture([[right]]).mean(-1) for right in (True, False)]
    bottom = [values[-40:-17] for values in gray]  # the captions
    assert (bottom[0] != bottom[1]).any()


def test_queries_and_neighbours_are_shown_unchanged():
    right = np.array([[True, False]])
    queries, neighbours = images(1, 40, 40), images(1, 2, 40, 40, seed=1)
    shown = gallery(queries, neighbours, ["q"], [["a", "b"]], right, title="")
    for image in (queries[0], *neighbours[0]):
        large = image.repeat(3, 0).repeat(3, 1)
        starts = np.argwhere((shown[:-120, :-120] == large[0, 0]).all(-1))
        assert any(np.array_equal(shown[y : y + 120, x : x + 120], large) for y, x in starts)


def test_a_frame_lies_outside_its_image_and_no_frame_changes_nothing():
    image = images(16, 16)
    plain = contact_sheet([Block("", [Row("", [image, image])])])
    without = contact_sheet([Block("", [Row("", [image, image], frames=[None, None])])])
    np.testing.assert_array_equal(plain, without)
    framed = contact_sheet([Block("", [Row("", [image, image], frames=[None, RED])])])
    assert framed.shape == (plain.shape[0] + 8, plain.shape[1] + 16, 3)
    at = places(framed, RED)
    top, left = at.min(0)
    inside = framed[top + 4 : at.max(0)[0] - 3, left + 4 : at.max(0)[1] - 3]
    np.testing.assert_array_equal(inside, image.repeat(9, 0).repeat(9, 1))


def test_frames_and_images_must_agree_in_number():
    with pytest.raises(ValueError, match="'blur' has 2 images and 1 frames"):
        contact_sheet([Block("", [Row("blur", list(images(2, 8, 8)), frames=[RED])])])


@pytest.mark.parametrize(
    ("right", "queries", "captions", "message"),
    [
        (np.ones((2, 3)), 2, 3, r"right is float64 of shape \(2, 3\); expected bool \[Q, K\]"),
        (np.ones(2, bool), 2, 3, r"bool of shape \(2,\)"),
        (np.ones((0, 3), bool), 0, 3, "Q >= 1"),
        (np.ones((2, 3), bool), 1, 3, "queries has 1 entries; expected 2, the rows of right"),
        (np.ones((2, 3), bool), 2, 2, "the query 'q' has 3 neighbours, 2 captions and 3 marks"),
    ],
)
def test_what_does_not_fit_is_refused(right, queries, captions, message):
    rows = len(right)
    with pytest.raises(ValueError, match=message):
        gallery(
            images(queries, 8, 8),
            images(rows, 3, 8, 8),
            ["q"] * rows,
            [["n"] * captions] * rows,
            right,
            title="",
        )
