"""A report as one HTML file that needs nothing else: no script, no style sheet, no image beside it."""

import base64
import io
import os
import pathlib
from collections.abc import Sequence
from html import escape
from typing import NamedTuple, TypeAlias

from PIL import Image, UnidentifiedImageError

from simclr_jax.table import Table, number_columns

_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --faint: #5d6066; --paper: #fff; --rule: #dcdde0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ea; --faint: #a3a6ad; --paper: #17181b; --rule: #3a3c41; }
}
body { margin: 0 auto; max-width: 60rem; padding: 1rem 1.25rem 4rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2, h3, h4, h5, h6 { line-height: 1.25; margin: 2.25rem 0 .5rem; }
h1 { font-size: 1.75rem; margin-top: 1rem; }
h2 { font-size: 1.35rem; border-top: 1px solid var(--rule); padding-top: 1rem; }
h3, h4, h5, h6 { font-size: 1.15rem; }
p { max-width: 42rem; margin: .5rem 0 1rem; }
figure { margin: 1.5rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption, caption { font-weight: 600; text-align: left; }
figcaption { margin-bottom: .5rem; }
.table { overflow-x: auto; margin: 1.5rem 0 .5rem; }
table { border-collapse: collapse; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
caption { padding-bottom: .35rem; max-width: calc(100vw - 2.5rem); }
th, td { padding: .3rem 1.5rem .3rem 0; text-align: left; vertical-align: baseline; }
th:last-child, td:last-child { padding-right: 0; }
thead th { color: var(--faint); border-bottom: 1px solid var(--faint); font-size: .875rem; }
tbody th { font-weight: normal; }
@media (min-width: 40rem) { tbody th { white-space: nowrap; } }
tbody tr + tr > * { border-top: 1px solid var(--rule); }
.number { text-align: right; white-space: nowrap; }
.note { color: var(--faint); font-size: .875rem; margin-top: 0; }
"""
_PIXELS_PER_INCH = 96  # of CSS


class Text(NamedTuple):
    """Paragraphs, below a heading unless it is empty."""

    heading: str
    paragraphs: Sequence[str]


class Picture(NamedTuple):
    """A picture below its caption, as large as its resolution says, or else a pixel of the page a pixel."""

    caption: str
    png: bytes | str | os.PathLike[str]  # the bytes of a PNG file, or its path
    alt: str  # what it shows, for those who cannot see it


class Section(NamedTuple):
    """Parts below a heading."""

    heading: str
    parts: Sequence["Part"]


Part: TypeAlias = Text | Table | Picture | Section


def page(title: str, parts: Sequence[Part]) -> str:
    """Render a report as a self-contained HTML document, light or dark as its reader has it.

    Args:
      title: of the page.
      parts: in their order; all their text is escaped. Headings go one level down with each section.

    Returns:
      The document; write it as UTF-8.

    Raises:
      ValueError: for a picture that is not PNG, or a table whose rows do not fit its columns.
      OSError: for a picture whose file cannot be read.
    """
    body = "\n".join(_part(part, 2) for part in parts)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
{body}
</main>
</body>
</html>
"""


def _part(part: Part, level: int) -> str:
    match part:
        case Text(heading, paragraphs):
            return "\n".join([*_heading(heading, level), *(f"<p>{escape(text)}</p>" for text in paragraphs)])
        case Section(heading, parts):
            inner = [*_heading(heading, level), *(_part(part, level + 1) for part in parts)]
            return "\n".join(["<section>", *inner, "</section>"])
        case Picture():
            return _picture(part)
        case Table():
            return _table(part)


def _heading(text: str, level: int) -> list[str]:
    level = min(level, 6)
    return [f"<h{level}>{escape(text)}</h{level}>"] if text else []


def _picture(picture: Picture) -> str:
    png = picture.png if isinstance(picture.png, bytes) else pathlib.Path(picture.png).read_bytes()
    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
            resolution = image.info.get("dpi", (_PIXELS_PER_INCH, _PIXELS_PER_INCH))[0]
            width, height = (round(side * _PIXELS_PER_INCH / resolution) for side in image.size)
    except UnidentifiedImageError:
        raise ValueError(f"the picture {picture.caption!r} is not a PNG file") from None
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f"""<figure>
<figcaption>{escape(picture.caption)}</figcaption>
<img src="{source}" width="{width}" height="{height}" alt="{escape(picture.alt)}">
</figure>"""


def _table(table: Table) -> str:
    classes = [' class="number"' if is_number else "" for is_number in number_columns(table)]
    headings = [
        f'<th scope="col"{kind}>{escape(text)}</th>'
        for kind, text in zip(classes, table.columns, strict=True)
    ]

    def row(cells: Sequence[str]) -> str:
        others = zip(classes[1:], cells[1:], strict=True)
        values = "".join(f"<td{kind}>{escape(text)}</td>" for kind, text in others)
        return f'<tr><th scope="row">{escape(cells[0])}</th>{values}</tr>'

    lines = [
        # A wide table is scrolled alone, by the keyboard too.
        f'<div class="table" role="region" aria-label="{escape(table.caption)}" tabindex="0">',
        f"<table><caption>{escape(table.caption)}</caption>",
        f"<thead><tr>{''.join(headings)}</tr></thead>",
        "<tbody>",
        *map(row, table.rows),
        "</tbody></table>",
        "</div>",
    ]
    return "\n".join(lines + ([f'<p class="note">{escape(table.note)}</p>'] if table.note else []))
