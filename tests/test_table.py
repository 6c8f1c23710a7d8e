import pytest

from simclr_jax.table import Table, number_columns, table_text


def test_columns_are_aligned_and_numbers_flush_right():
    table = Table(
        "1-NN accuracy on shapes[test]",
        ["representation", "width", "accuracy", "metric"],
        [
            ["raw pixels", "3,072", "40.6%", "cosine"],
            ["trained", "512", "9.5 ± 0.4%", "euclidean"],
        ],
        "1,000 queries",
    )
    assert table_text(table).splitlines() == [
        "1-NN accuracy on shapes[test]",
        "  representation  width    accuracy  metric",
        "  raw pixels      3,072       40.6%  cosine",
        "  trained           512  9.5 ± 0.4%  euclidean",
        "1,000 queries",
    ]


def test_a_table_may_have_no_rows_and_no_note():
    assert table_text(Table("empty", ["run", "loss"], [])) == "empty\n  run  loss"


@pytest.mark.parametrize(
    "text",
    [
        "93.5%",
        "93.5 ± 0.4",
        "-1,240",
        "+3",
        "1e-4",
        "< 0.1",
        "32 px",
        "12.3 s",
        "3.5 GiB",
        "5 / 10",
        "–",
        "-",
        "",
    ],
)
def test_numbers(text):
    assert number_columns(Table("", ["name", "value"], [["1", text], ["2", "7"]])) == [False, True]


@pytest.mark.parametrize(
    "text", ["cat", "3x3 stem", "ResNet-18", "runs/a", "1-NN of raw pixels", "nan", "--"]
)
def test_words(text):
    assert number_columns(Table("", ["name", "value"], [["1", "7"], ["2", text]])) == [False, False]


def test_a_long_cell_is_judged_at_once():
    number_columns(Table("", ["name", "value"], [["1", "1" * 5000 + "_"]]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["a", "b"], "'few labels' has 2 columns and a row of 3 cells"),
        ([], "'few labels' has no columns"),
    ],
)
def test_rows_must_fit_the_columns(columns, message):
    with pytest.raises(ValueError, match=message):
        table_text(Table("few labels", columns, [["1", "2", "3"]]))
