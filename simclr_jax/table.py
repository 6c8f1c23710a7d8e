"""A small table of results, and how it looks in a terminal."""

import re
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

# "93.5%", "93.5 ± 0.4", "-1,240", "1e-4", "32 px", or "–" for none.
_NUMBER = re.compile(r"\W*\d[\d\W]*(e[-+]?\d+)?[^\W\d]*\W*|[-–]?")

_NOTE_WIDTH = 100  # characters


class Table(NamedTuple):
    """Rows of text below a caption; the first column names the rows."""

    caption: str
    columns: Sequence[str]  # headings, with the unit where the cells have none
    rows: Sequence[Sequence[str]]
    note: str = ""  # below the table


def number_columns(table: Table) -> list[bool]:
    """Tell which columns hold nothing but numbers, and so are set flush right.

    A number is digits and signs, with at most one word behind, its unit. An empty cell or a dash counts
    as a number.

    Returns:
      One for each column; False for the first.

    Raises:
      ValueError: if a row has more or fewer cells than the table has columns, or there is no column.
    """
    if not table.columns:
        raise ValueError(f"the table {table.caption!r} has no columns")
    for row in table.rows:
        if len(row) != len(table.columns):
            raise ValueError(
                f"the table {table.caption!r} has {len(table.columns)} columns and a row of {len(row)} cells"
            )
    others = range(1, len(table.columns))
    return [False, *(all(_NUMBER.fullmatch(row[column]) for row in table.rows) for column in others)]


def table_text(table: Table) -> str:
    """Render a table for the terminal: its columns aligned, numbers flush right.

    Args:
      table: any; it may have no rows.

    Returns:
      Lines without a newline at the end: the caption, the headings, the rows, indented by two, and the
      note.

    Raises:
      ValueError: as `number_columns`.
    """
    flush_right = number_columns(table)
    lines = [table.columns, *table.rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(table.columns))]

    def aligned(line: Sequence[str]) -> str:
        cells = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, flush_right, strict=True)
        ]
        return ("  " + "  ".join(cells)).rstrip()

    texts = [table.caption, *map(aligned, lines), textwrap.fill(table.note, _NOTE_WIDTH)]
    return "\n".join(text for text in texts if text)
