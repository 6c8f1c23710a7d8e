import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

from simclr_jax import figures

PNG = "chart.png"
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture(autouse=True)
def one_thread():
    """On a busy machine the threads of t-SNE wait for each other: 13 s for 4 points where one takes 0.1."""
    with threadpool_limits(1, user_api="openmp"):
        yield


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, newest last."""
    saved, save = [], Figure.savefig

    def spy(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spy)
    return saved


def clusters(count, rows, width, *, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.arange(rows) % count
    centres = generator.normal(size=(count, width)) * 4
    return (centres[labels] + generator.normal(size=(rows, width))).astype(np.float32), labels


def purity(points, labels):
    """Share of points whose nearest other has their label."""
    two = KNeighborsClassifier(2).fit(points, labels).kneighbors(points, return_distance=False)
    return np.mean(labels[two[:, 1]] == labels)


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def records(*, untrained=None, raw_pixels=None, knn=()):
    first = {"step": 0, "epoch": 0.0, "images": 90}
    first |= {} if untrained is None else {"knn1_accuracy_untrained": untrained}
    first |= {} if raw_pixels is None else {"knn1_accuracy_raw_pixels": raw_pixels}
    steps = [{"step": i, "epoch": i / 10, "loss": 5 - 0.1 * i, "contrast_top1": 0.02 * i} for i in (10, 20)]
    return [first, *steps, *({"step": 10, "epoch": epoch, "knn1_accuracy": value} for epoch, value in knn)]


@pytest.mark.parametrize("shape", [(50, 7), (5, 40), (2, 2)])
def test_pca_is_that_of_scikit_learn_up_to_the_sign_of_an_axis(shape):
    features = np.random.default_rng(0).normal(size=shape) * np.arange(1, shape[1] + 1) + 3
    points = figures.pca(features)
    reference = PCA(2).fit(features.astype(np.float64))
    expected = reference.transform(features)
    signs = np.sign(np.sum(points * expected, axis=0, keepdims=True))
    assert points.dtype == np.float32
    np.testing.assert_allclose(points, signs * expected, atol=1e-4 * np.abs(expected).max())


def test_the_sign_of_an_axis_is_that_of_its_largest_entry():
    features = np.random.default_rng(1).normal(size=(200, 3)) * [9, 4, 1]
    points = figures.pca(features)
    for axis in range(2):
        assert np.corrcoef(points[:, axis], features[:, axis])[0, 1] > 0.9
    np.testing.assert_allclose(figures.pca(-features), -points, atol=1e-4)


def test_tsne_keeps_neighbours_together_and_repeats_to_the_bit():
    features, labels = clusters(4, 160, 80)  # wider than what t-SNE is given
    points = figures.tsne(features, seed=3)
    assert points.shape == (160, 2) and points.dtype == np.float32
    assert purity(points, labels) == 1
    np.testing.assert_array_equal(figures.tsne(features, seed=3), points)


def test_tsne_takes_few_rows_and_rows_that_are_equal():
    features, _ = clusters(2, 4, 3)
    assert np.isfinite(figures.tsne(features, seed=0)).all()
    np.testing.assert_array_equal(figures.tsne(np.full((9, 60), 0.1), seed=0), np.zeros((9, 2)))


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.zeros((3, 5)), {}, r"\(3, 5\); expected \[N, F\], N >= 4 and F >= 2"),
        (np.zeros((9, 1)), {}, "F >= 2"),
        (np.zeros(9), {}, r"\(9,\); expected \[N, F\]"),
        (np.full((9, 3), np.nan), {}, "NaN or an infinity"),
        (np.zeros((9, 3)), {"perplexity": 0.5}, "perplexity is 0.5; expected at least 1"),
    ],
)
def test_features_that_cannot_be_embedded_are_refused(features, options, message):
    with pytest.raises(ValueError, match=message):
        figures.tsne(features, seed=0, **options)
    if not options and len(features) != 3:
        with pytest.raises(ValueError, match=message.replace("N >= 4", "N >= 2")):
            figures.pca(features)


# Linear sRGB as a deuteranope and a protanope see it: Machado et al. 2009, severity 1.
SIGHT = {
    "normal": np.eye(3),
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.01182, 0.04294, 0.968881],
    ],
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}
# From linear sRGB to OKLab: Ottosson 2020.
CONES = [
    [0.4122214708, 0.5363325363, 0.0514459929],
    [0.2119034982, 0.6806995451, 0.1073969566],
    [0.0883024619, 0.2817188376, 0.6299787005],
]
OKLAB = [
    [0.2104542553, 0.793617785, -0.0040720468],
    [1.9779984951, -2.428592205, 0.4505937099],
    [0.0259040371, 0.7827717662, -0.808675766],
]


@pytest.mark.parametrize(("sight", "least"), [("normal", 0.15), ("deuteranope", 0.105), ("protanope", 0.105)])
def test_colours_stay_apart_for_the_colour_blind(sight, least):
    gamma = np.array([to_rgb(colour) for colour in figures.COLOURS])
    linear = np.where(gamma <= 0.04045, gamma / 12.92, ((gamma + 0.055) / 1.055) ** 2.4)
    seen = np.clip(linear @ np.transpose(SIGHT[sight]), 0, 1)
    lab = np.cbrt(seen @ np.transpose(CONES)) @ np.transpose(OKLAB)
    distances = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    assert distances[np.triu_indices(len(lab), 1)].min() > least


def draw_all(folder):
    """One chart of each kind."""
    points, labels = clusters(10, 60, 2)
    figures.scatter(folder / "scatter.png", points, labels, CLASSES, title="t-SNE")
    figures.loss_curve(folder / "loss.png", {"a": records(knn=[(1, 0.5)])}, title="loss")
    figures.label_curve(folder / "labels.png", {"a": [(1, 0.2, 0.1), (10, 0.5, 0.02)]}, title="labels")
    figures.epoch_curve(folder / "epochs.png", {"a": [(0, 0.1), (10, 0.9)]}, title="epochs")
    figures.heat_map(folder / "heat.png", np.eye(2), ["a", "b"], ["a", "b"], title="cells")
    figures.confusion_matrix(folder / "confusion.png", np.eye(10), CLASSES, title="few classes")
    figures.confusion_matrix(folder / "many.png", np.eye(40), list(map(str, range(40))), title="many")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_files_depend_on_the_input_alone(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    first = draw_all(tmp_path / "one")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "lines.linewidth": 9}):
        before = dict(matplotlib.rcParams)
        second = draw_all(tmp_path / "two")
        assert dict(matplotlib.rcParams) == before
    assert len(first) == 7 and first == second
    for path in (tmp_path / "one").iterdir():
        with Image.open(path) as image:
            assert set(image.info) == {"dpi"}  # no date and no version
            edge = np.asarray(image.convert("RGB"))
        for side in (edge[0], edge[-1], edge[:, 0], edge[:, -1]):
            assert (side == 255).all()  # nothing is cut off


def test_points_lie_where_they_belong_in_the_colour_of_their_class(tmp_path, drawn):
    points = np.array([[0.0, 0], [10, 0], [0, 5]]).repeat(20, 0)
    labels = np.array([0, 1, 13]).repeat(20)
    names = [f"class {i}" for i in range(14)]
    figures.scatter(tmp_path / PNG, points, labels, names, title="three classes")
    (figure,) = drawn
    assert legend_texts(figure) == names
    (axes,) = figure.axes
    assert axes.get_title(loc="left") == "three classes"
    seen = set()
    for number, collection in enumerate(axes.collections):
        if len(collection.get_offsets()):
            for point, colour in zip(collection.get_offsets(), collection.get_facecolors(), strict=True):
                seen.add((*point, to_hex(colour), number))
    assert seen == {
        (0, 0, figures.COLOURS[0], 0),
        (10, 0, figures.COLOURS[1], 0),
        (0, 5, figures.COLOURS[3], 1),
    }
    handles = figure.legends[0].legend_handles
    looks = [(handle.get_color(), handle.get_marker()) for handle in handles]
    assert looks[13] == (figures.COLOURS[3], figures.MARKERS[1]) and len(set(looks)) == 14


def test_points_of_the_classes_are_drawn_in_a_mixed_order(tmp_path, drawn):
    figures.scatter(tmp_path / PNG, np.zeros((400, 2)), np.arange(400) // 200, ["a", "b"], title="")
    colours = drawn[0].axes[0].collections[0].get_facecolors()
    last = (colours[200:] == colours[200]).all(axis=1).mean()
    assert 0.35 < last < 0.65


def test_a_hundred_classes_differ_and_their_names_are_taken_literally(tmp_path, drawn):
    names = ["_hidden", "$x_", *(str(i) for i in range(98))]
    points, labels = clusters(100, 200, 2)
    figures.scatter(tmp_path / PNG, points, labels, names, title="$")
    assert legend_texts(drawn[0]) == names and figures.MAX_CLASSES == 100
    looks = {(handle.get_color(), handle.get_marker()) for handle in drawn[0].legends[0].legend_handles}
    assert len(looks) == 100


@pytest.mark.parametrize(
    ("shape", "labels", "names", "message"),
    [
        ((4, 3), [0] * 4, ["a"], r"points has shape \(4, 3\)"),
        ((0, 2), [], ["a"], r"\[N, 2\] with N >= 1"),
        ((4, 2), [0] * 3, ["a"], r"labels has shape \(3,\); expected \(4,\)"),
        ((4, 2), [0, 1, 2, 0], ["a", "b"], "labels are 0 to 2; expected 0 to 1"),
        ((4, 2), [0, -1, 0, 0], ["a"], "labels are -1 to 0"),
        ((4, 2), [0] * 4, ["a"] * 101, "101 class names; expected 1 to 100"),
    ],
)
def test_points_that_do_not_fit_are_refused_and_leave_no_file(tmp_path, shape, labels, names, message):
    with pytest.raises(ValueError, match=message):
        figures.scatter(tmp_path / PNG, np.zeros(shape), np.array(labels, int), names, title="")
    assert not list(tmp_path.iterdir())


def test_the_loss_curve_has_a_panel_for_what_was_measured(tmp_path, drawn):
    runs = {
        "first": records(untrained=0.1, raw_pixels=0.4, knn=[(1, 0.5), (2, 0.7)]),
        "second": records(),
    }
    figures.loss_curve(tmp_path / PNG, runs, title="two runs")
    loss, contrast, knn = drawn[0].axes
    assert [axes.get_ylabel() for axes in (loss, contrast, knn)] == [
        "loss",
        "contrast top-1",
        "1-NN accuracy",
    ]
    np.testing.assert_allclose(loss.lines[1].get_xydata(), [(1, 4), (2, 3)])
    np.testing.assert_allclose(contrast.lines[0].get_xydata(), [(1, 0.2), (2, 0.4)])
    np.testing.assert_allclose(knn.lines[0].get_xydata(), [(0, 0.1), (1, 0.5), (2, 0.7)])
    assert list(knn.lines[2].get_ydata()) == [0.4, 0.4]
    assert [text.get_text() for text in knn.texts] == ["raw pixels"]
    assert legend_texts(drawn[0]) == ["first", "second"]

    figures.loss_curve(tmp_path / PNG, {"second": records()}, title="one run")
    assert len(drawn[1].axes) == 2 and not drawn[1].legends


def test_a_loss_curve_without_loss_is_refused(tmp_path):
    for runs in ({}, {"a": []}, {"a": records()[:1]}):
        with pytest.raises(ValueError, match="no record has a loss"):
            figures.loss_curve(tmp_path / PNG, runs, title="")


def test_the_label_curve_has_a_tick_for_each_number_of_labels_and_a_band(tmp_path, drawn):
    curves = {"probe": [(1000, 0.8, 0.01), (1, 0.3, 0.4)], "1-NN": [(20, 0.5, 0.1)]}
    figures.label_curve(tmp_path / PNG, curves, title="few labels")
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "20", "1,000"]
    assert not axes.xaxis.get_minorticklocs().size
    assert all(label.get_text().endswith("%") for label in axes.get_yticklabels())
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(1, 0.3), (1000, 0.8)])
    band = axes.collections[0].get_datalim(axes.transData)
    np.testing.assert_allclose([band.ymin, band.ymax], [0, 0.81])  # cut at 0
    assert legend_texts(drawn[0]) == ["probe", "1-NN"]


def test_the_epoch_curve_orders_its_points(tmp_path, drawn):
    figures.epoch_curve(tmp_path / PNG, {"a": [(20, 0.5), (0, 0.1)], "b": [(0, 0.2)]}, title="epochs")
    (axes,) = drawn[0].axes
    np.testing.assert_allclose(axes.lines[0].get_xydata(), [(0, 0.1), (20, 0.5)])
    looks = [(line.get_color(), line.get_marker()) for line in axes.lines]
    assert looks == [(line.get_color(), line.get_marker()) for line in drawn[0].legends[0].legend_handles]


@pytest.mark.parametrize(
    ("curves", "message"),
    [
        ({}, "no point to draw"),
        ({"a": []}, "no point to draw"),
        ({"a": [(1, 81.5)]}, "an accuracy is 81.5; expected 0 to 1"),
        ({"a": [(1, 0.5), (2, float("nan"))]}, "an accuracy is nan"),
    ],
)
def test_curves_of_something_else_than_accuracies_are_refused(tmp_path, curves, message):
    with pytest.raises(ValueError, match=message):
        figures.epoch_curve(tmp_path / PNG, curves, title="")
    with pytest.raises(ValueError, match=message):
        few = {name: [(*point, 0.0) for point in curve] for name, curve in curves.items()}
        figures.label_curve(tmp_path / PNG, few, title="")


def test_labels_a_class_are_at_least_one(tmp_path):
    with pytest.raises(ValueError, match="labels a class are 0; expected at least 1"):
        figures.label_curve(tmp_path / PNG, {"a": [(0, 0.1, 0.1), (5, 0.4, 0.1)]}, title="")


def test_the_heat_map_prints_each_value_on_ground_that_it_can_be_read_on(tmp_path, drawn):
    values = np.array([[0.1, 0.5, 0.3], [0.9, np.nan, np.nan]])
    figures.heat_map(
        tmp_path / PNG,
        values,
        ["crop", "color"],
        ["crop", "color jitter", "average"],
        title="1-NN accuracy",
        row_axis="first operation",
        column_axis="second operation",
        average_column=True,
    )
    (axes,) = drawn[0].axes
    assert [text.get_text() for text in axes.texts] == ["10.0", "50.0", "30.0", "90.0", "", ""]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("second operation", "first operation")
    assert axes.get_title(loc="left") == "1-NN accuracy (%)"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["crop", "color"]
    squares, colours = cells(axes)
    left = squares[:3, 0, 0]
    assert left[2] - left[1] > 1.2 * (left[1] - left[0])
    assert axes.get_ylim() == (2, 0)  # the first row is at the top
    assert colours[4] == colours[5] != colours[0]
    for colour, text in zip(colours[:4], axes.texts, strict=False):
        assert contrast(colour, text.get_color()) > 3


def cells(axes):
    """Corners [N, 5, 2] and colours of the cells of a table, row by row."""
    (collection,) = axes.collections
    return np.array([path.vertices for path in collection.get_paths()]), [
        to_hex(colour) for colour in collection.get_facecolors()
    ]


def contrast(one, other):
    """Of WCAG 2, which asks for 3 between large text and its ground."""
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def luminance(colour):
    gamma = np.array(to_rgb(colour))
    return np.where(gamma <= 0.04045, gamma / 12.92, ((gamma + 0.055) / 1.055) ** 2.4) @ [
        0.2126,
        0.7152,
        0.0722,
    ]


@pytest.mark.parametrize("values", [np.full((1, 2), np.nan), np.full((1, 2), 0.25)])
def test_a_heat_map_of_one_value_or_none_is_drawn(tmp_path, drawn, values):
    figures.heat_map(tmp_path / PNG, values, ["a"], ["a", "b"], title="")
    assert len(set(cells(drawn[0].axes[0])[1])) == 1


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 1)), r"shape \(2, 1\); expected \(1, 2\)"),
        (np.array([[0.5, 48.2]]), "values are 0.5 to 48.2; expected accuracies in"),
        (np.array([[-0.1, np.nan]]), "values are -0.1 to -0.1"),
    ],
)
def test_values_that_do_not_fit_a_heat_map_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        figures.heat_map(tmp_path / PNG, values, ["a"], ["a", "b"], title="")


COUNTS = np.array([[3, 1, 0], [0, 0, 0], [99, 1, 1899]])


def test_the_confusion_matrix_prints_shares_of_the_true_class(tmp_path, drawn):
    figures.confusion_matrix(tmp_path / PNG, COUNTS, ["cat", "dog", "$x_"], title="Confusion of a")
    (axes,) = drawn[0].axes
    squares, colours = cells(axes)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["75.0", "25.0", "0", "", "", "", "5.0", "0.1", "95.0"]
    for square, text in zip(squares, axes.texts, strict=True):
        np.testing.assert_allclose(square[:4].mean(axis=0), text.get_position())
    for place, (row, column) in enumerate(np.ndindex(3, 3)):
        np.testing.assert_allclose(axes.texts[place].get_position(), (column + 0.5, row + 0.5))
    assert axes.get_ylim() == (3, 0)  # the first class is at the top
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["cat", "dog", "$x_"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction", "truth")
    assert axes.get_title(loc="left") == "Confusion of a (% of each class)"
    # A class without images has a colour that no share has.
    assert len(set(colours[3:6])) == 1 and colours[3] not in colours[:3] + colours[6:]
    for colour, text in zip(colours, axes.texts, strict=True):
        assert not text.get_text() or contrast(colour, text.get_color()) > 3


@pytest.mark.parametrize("share", np.linspace(0.01, 1, 12))
def test_each_number_of_a_confusion_matrix_can_be_read_on_its_ground(tmp_path, drawn, share):
    figures.confusion_matrix(tmp_path / PNG, np.array([[share, 1 - share], [0, 1]]), ["a", "b"], title="")
    (axes,) = drawn[0].axes
    for colour, text in zip(cells(axes)[1], axes.texts, strict=True):
        assert contrast(colour, text.get_color()) > 3


def test_the_colours_do_not_depend_on_the_other_shares(tmp_path, drawn):
    for counts in ([[9, 1], [0, 10]], [[9, 1], [5, 5]]):
        figures.confusion_matrix(tmp_path / PNG, np.array(counts), ["a", "b"], title="")
    one, other = (cells(figure.axes[0])[1] for figure in drawn)
    assert one[:2] == other[:2] and one[2:] != other[2:]


@pytest.mark.parametrize("classes", [1, 20, 21, 30, 31, 100])
def test_more_classes_have_a_scale_for_numbers_and_the_most_no_names(tmp_path, drawn, classes):
    names = [f"the class {number}" for number in range(classes)]
    figures.confusion_matrix(tmp_path / PNG, np.eye(classes), names, title="")
    axes, *scales = drawn[0].axes
    assert len(cells(axes)[1]) == classes**2
    assert len(axes.texts) == (classes**2 if classes <= 20 else 0)
    assert len(scales) == (classes > 20)
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == (names if classes <= 30 else [])
    side = axes.get_window_extent().width / classes
    for text in axes.texts:
        assert text.get_window_extent().width < 0.96 * side  # even of 100.0
    if classes <= 30:
        heights = [label.get_window_extent().height for label in axes.get_yticklabels()]
        assert max(heights) < side
    for scale in scales:
        labels = [label.get_text() for label in scale.get_yticklabels()]
        assert labels == ["0%", "1%", "5%", "20%", "50%", "100%"]


@pytest.mark.parametrize(
    ("counts", "names", "message"),
    [
        (np.ones((2, 3)), ["a", "b"], r"counts has shape \(2, 3\); expected \(2, 2\)"),
        (np.ones((3, 3)), ["a", "b"], r"counts has shape \(3, 3\); expected \(2, 2\)"),
        (np.array([[1, -1], [0, 1]]), ["a", "b"], "counts hold -1; expected"),
        (np.array([[1, np.nan], [0, 1]]), ["a", "b"], "counts hold nan; expected"),
        (np.ones((0, 0)), [], "0 class names; expected 1 to 100"),
        (np.ones((101, 101)), ["a"] * 101, "101 class names; expected 1 to 100"),
    ],
)
def test_counts_that_do_not_fit_are_refused(tmp_path, counts, names, message):
    with pytest.raises(ValueError, match=message):
        figures.confusion_matrix(tmp_path / PNG, counts, names, title="")
    assert not list(tmp_path.iterdir())
