import jax.numpy as jnp
import numpy as np
import pytest

from simclr_jax.sheet import Block, Row, contact_sheet, view_grid

PAPER = 208


def noise(*shape, seed=0):
    """Images without the gray of the paper."""
    return np.random.default_rng(seed).integers(0, 200, (*shape, 3), np.uint8)


def sheet(*rows, heading="", **options):
    return contact_sheet([Block(heading, rows)], **options)


def inked(picture):
    """What is not paper, bool [H, W]."""
    return (picture != PAPER).any(-1)


def spans(used):
    """The (start, stop) of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], used, [False]]).astype(int)))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def test_a_small_image_is_enlarged_by_a_whole_factor_without_new_colours():
    image = noise(32, 32)
    picture = sheet(Row("", [image]), cell=144)
    assert picture.dtype == np.uint8
    ((top, bottom),), ((left, right),) = spans(inked(picture).any(1)), spans(inked(picture).any(0))
    np.testing.assert_array_equal(picture[top:bottom, left:right], image.repeat(4, 0).repeat(4, 1))


def test_a_large_image_is_reduced_and_keeps_its_aspect_and_mean():
    image = noise(150, 300)
    picture = sheet(Row("", [image]), cell=100)
    ((top, bottom),), ((left, right),) = spans(inked(picture).any(1)), spans(inked(picture).any(0))
    assert (bottom - top, right - left) == (50, 100)
    shown = picture[top:bottom, left:right]
    assert abs(shown.mean() - image.mean()) < 1
    assert shown.std() < image.std() / 2  # antialiased: not every ninth pixel


def test_floats_are_shown_as_their_nearest_eight_bits():
    image = noise(48, 48)
    floats = image / np.float32(255) + np.float32(0.4 / 255)
    expected = sheet(Row("", [image]))
    for same in (floats, floats.astype(np.float64), jnp.asarray(floats)):
        np.testing.assert_array_equal(sheet(Row("", [same])), expected)
    white, black = np.full((8, 8, 3), 1.2), np.full((8, 8, 3), -0.2)
    assert set(np.unique(sheet(Row("", [white, black])))) == {0, PAPER, 255}


def test_cells_are_equal_and_aligned_over_rows_and_blocks():
    first = Block("", [Row("", [noise(32, 32), noise(32, 32)]), Row("", [noise(32, 20), noise(20, 32)])])
    picture = contact_sheet([first, Block("", [Row("", [noise(64, 64)] * 3)])], cell=64)
    (margin, right), *others = spans(inked(picture).any(0))
    assert right - margin == 64
    gap = others[0][0] - right
    assert others == [(margin + i * (64 + gap), margin + i * (64 + gap) + 64) for i in (1, 2)]
    assert picture.shape[1] == others[-1][1] + margin
    rows = spans(inked(picture).any(1))
    assert [bottom - top for top, bottom in rows] == [64, 64, 64]
    assert rows[1][0] - rows[0][1] == gap < rows[2][0] - rows[1][1]
    tall = spans(inked(picture)[slice(*rows[1])].any(0))[0]
    assert tall == (margin + 12, margin + 52)  # in the middle of its cell


def test_captions_lie_in_the_middle_below_their_images():
    images = [noise(64, 64), noise(64, 64)]
    plain = sheet(Row("", images), cell=64)
    picture = sheet(Row("", images, ["0.50", "a caption that is wider than its cell"]), cell=64)
    assert picture.shape[0] > plain.shape[0] and picture.shape[1] == plain.shape[1]
    (_, bottom), *texts = spans(inked(picture).any(1))
    assert texts
    columns = np.flatnonzero(inked(picture)[bottom:].any(0))
    (left, right), (other, end) = spans(inked(plain).any(0))
    first, second = columns[columns < right], columns[columns >= right]
    assert abs((first.min() + first.max()) - (left + right)) <= 4
    assert other <= second.min() and second.max() <= end  # cut short


def test_labels_and_headings_go_on_in_the_next_line():
    image = noise(64, 64)
    short = sheet(Row("blur", [image]), heading="Views", cell=64)
    words = "operation after operation " * 4
    long = sheet(Row(f"{words}\nsmaller", [image]), heading=words, cell=64)
    assert short.shape[0] < long.shape[0] and short.shape[1] < long.shape[1] < 400
    for picture in (short, long, sheet(Row("x" * 500, [image]), cell=64)):
        edge = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert (edge == PAPER).all()  # nothing is cut off


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one image"),
        ([Row("blur", [])], "at least one image"),
        ([Row("blur", [noise(8, 8)], ["0.1", "0.2"])], "'blur' has 1 images and 2 captions"),
        ([Row("", [np.zeros((8, 8))])], r"\[H, W, 3\], got \(8, 8\)"),
        ([Row("", [np.zeros((0, 8, 3))])], r"\[H, W, 3\], got \(0, 8, 3\)"),
        ([Row("", [np.zeros((8, 8, 3), int)])], "uint8, or float .* got int64"),
    ],
)
def test_what_is_no_image_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        sheet(*rows)


def test_a_grid_has_a_row_for_each_image_and_a_column_for_each_view():
    views = noise(2, 3, 8, 5)
    grid = view_grid(views)
    assert grid.shape == (3 * 10 - 2, 2 * 7 - 2, 3) and grid.dtype == np.uint8
    for view in range(2):
        for image in range(3):
            shown = grid[image * 10 : image * 10 + 8, view * 7 : view * 7 + 5]
            np.testing.assert_array_equal(shown, views[view, image])
    assert (grid[8:10] == PAPER).all() and (grid[:, 5:7] == PAPER).all()


def test_a_grid_takes_views_of_any_type_that_training_makes():
    views = noise(2, 3, 8, 5)
    floats = jnp.asarray(views / np.float32(255))
    np.testing.assert_array_equal(view_grid(floats), view_grid(views))
    np.testing.assert_array_equal(view_grid(floats.astype(jnp.bfloat16)), view_grid(views))


@pytest.mark.parametrize("shape", [(2, 3, 8, 5), (2, 3, 8, 5, 1), (2, 0, 8, 5, 3)])
def test_a_grid_of_something_else_is_refused(shape):
    with pytest.raises(ValueError, match=r"\[count, n, H, W, 3\]"):
        view_grid(np.zeros(shape, np.float32))
