import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from simclr_jax.page import Picture, Section, Text, page
from simclr_jax.table import Table

VOID = {"meta", "img"}


class Outline(HTMLParser):
    """The elements of a document, with their attributes and own text; each end tag must match."""

    def __init__(self, document):
        super().__init__()
        self.elements = []
        self._open = []
        self.feed(document)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        element = {"tag": tag, "text": "", **dict(attrs)}
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag):
        assert self._open.pop()["tag"] == tag

    def handle_data(self, data):
        if self._open:
            self._open[-1]["text"] += data

    def find(self, tag):
        return [element for element in self.elements if element["tag"] == tag]

    def texts(self, *tags):
        return [element["text"] for element in self.elements if element["tag"] in tags]


def png(width=6, height=4, **options):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((height, width, 3), np.uint8)).save(buffer, "PNG", **options)
    return buffer.getvalue()


def test_headings_go_one_level_down_with_each_section():
    inner = Section("Few labels", [Text("One a class", ["Hard.", "Very."]), Text("", ["No heading."])])
    outline = Outline(page("Evaluation", [Text("Run", []), Section("Probes", [inner])]))
    headings = [
        (element["tag"], element["text"])
        for element in outline.elements
        if re.match("h[1-6]", element["tag"])
    ]
    assert headings == [
        ("h1", "Evaluation"),
        ("h2", "Run"),
        ("h2", "Probes"),
        ("h3", "Few labels"),
        ("h4", "One a class"),
    ]
    assert outline.texts("p") == ["Hard.", "Very.", "No heading."]
    assert outline.texts("title") == ["Evaluation"]


def test_headings_stop_at_the_sixth_level():
    part = Text("deep", [])
    for _ in range(8):
        part = Section("", [part])
    assert Outline(page("", [part])).texts("h6") == ["deep"]


def test_all_text_is_escaped():
    nasty = "<script>alert(\"1\")</script> & 'x'"
    parts = [
        Text(nasty, [nasty]),
        Table(nasty, [nasty, nasty], [[nasty, nasty]], nasty),
        Picture(nasty, png(), nasty),
        Section(nasty, []),
    ]
    outline = Outline(page(nasty, parts))
    assert not outline.find("script")
    tags = ("title", "h1", "h2", "p", "caption", "th", "td", "figcaption")
    assert outline.texts(*tags) == [nasty] * 12
    assert outline.find("img")[0]["alt"] == nasty
    assert [element["aria-label"] for element in outline.find("div")] == [nasty]


def test_a_table_names_its_rows_and_columns_and_sets_numbers_flush_right():
    table = Table(
        "accuracy (%)", ["features", "1-NN", "metric"], [["raw", "40.6", "cosine"], ["z", "–", "none"]]
    )
    outline = Outline(page("", [table]))
    assert outline.texts("caption") == ["accuracy (%)"]
    assert [(cell["scope"], cell["text"]) for cell in outline.find("th")] == [
        *(("col", text) for text in table.columns),
        *(("row", text) for text in ("raw", "z")),
    ]
    assert outline.texts("td") == ["40.6", "cosine", "–", "none"]
    numbers = [element["text"] for element in outline.elements if element.get("class") == "number"]
    assert numbers == ["1-NN", "40.6", "–"]
    assert not outline.find("p")  # no empty note


def test_pictures_are_inside_whether_given_as_bytes_or_as_a_path(tmp_path):
    path = tmp_path / "chart.png"
    path.write_bytes(png(30, 20, dpi=(144, 144)))
    shown = Outline(
        page("", [Picture("a", png(), "black"), Picture("b", path, ""), Picture("c", str(path), "")])
    )
    sources = [element["src"] for element in shown.find("img")]
    prefix = "data:image/png;base64,"
    assert all(source.startswith(prefix) for source in sources)
    inside = [base64.b64decode(source[len(prefix) :]) for source in sources]
    assert inside == [png(), path.read_bytes(), path.read_bytes()]
    sizes = [(element["width"], element["height"]) for element in shown.find("img")]
    assert sizes == [("6", "4"), ("20", "13"), ("20", "13")]  # 144 pixels an inch are shown as 96


def test_nothing_is_loaded_from_elsewhere():
    document = page("t", [Table("c", ["a"], [["b"]]), Picture("p", png(), "")])
    outline = Outline(document)
    for element in outline.elements:
        assert not {"href", "srcset", "action", "poster"} & set(element)
        assert element.get("src", "data:").startswith("data:")
    assert not {"script", "link", "iframe", "base"} & {element["tag"] for element in outline.elements}
    (style,) = outline.texts("style")
    assert "url(" not in style and "@import" not in style
    assert {"utf-8"} == {element["charset"] for element in outline.find("meta") if "charset" in element}
    (policy,) = [element["content"] for element in outline.find("meta") if "http-equiv" in element]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_what_is_no_png_or_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the picture 'views' is not a PNG file"):
        page("", [Picture("views", b"GIF89a", "")])
    with pytest.raises(ValueError, match="'probe' has 2 columns and a row of 1 cells"):
        page("", [Section("", [Table("probe", ["a", "b"], [["1"]])])])
    with pytest.raises(FileNotFoundError):
        page("", [Picture("views", tmp_path / "none.png", "")])
