"""Tables of estimates as CSV for programs (full precision, interval bounds in separate columns), and as
Markdown and LaTeX for readers."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peso.evaluation.intervals import Estimate
from peso.runtime.failures import printable

Mark = Literal["", "best", "tied", "worse"]
ABSENT = "–"


@dataclass(frozen=True)
class Quantity:
    """A number in a table.

    Attributes:
        value: the number.
        half_width: half the width of a symmetric interval; nan without one.
        decimals: the number of decimals to show.
        mark: how the number compares with the best of its column.
        bounds: the bounds of an interval that is not symmetric; nan without one.
        chance: whether the number is a probability, which is never shown as 0.

    >>> Quantity(0.03124, 0.0041, decimals=4).text
    '0.0312 ± 0.0041'
    >>> Quantity(1234567).text
    '1,234,567'
    >>> Quantity(2.0, decimals=1, bounds=(-1.0, 6.0)).text
    '2.0 (−1.0 to 6.0)'
    >>> Quantity(0.00001, decimals=4, chance=True).text
    '<0.0001'
    """

    value: float
    half_width: float = math.nan
    decimals: int = 0
    mark: Mark = ""
    bounds: tuple[float, float] = (math.nan, math.nan)
    chance: bool = False

    @classmethod
    def of(cls, estimate: Estimate | None, decimals: int, mark: Mark = "") -> Quantity | None:
        """An estimate with its interval; None if there is no estimate."""
        return (
            None
            if estimate is None
            else cls(estimate.value, estimate.half_width, decimals=decimals, mark=mark)
        )

    @property
    def number(self) -> str:
        """The number as text."""
        least = 10.0**-self.decimals
        return f"<{self._shown(least)}" if self.chance and self.value < least else self._shown(self.value)

    @property
    def margin(self) -> str:
        """The interval as text after the number; empty without an interval."""
        if not math.isnan(self.half_width):
            return f" ± {self._shown(self.half_width)}"
        if not math.isnan(self.bounds[0]):
            return f" ({self._shown(self.bounds[0])} to {self._shown(self.bounds[1])})"
        return ""

    @property
    def interval(self) -> tuple[float, float]:
        """The bounds of the interval; nan without an interval."""
        if math.isnan(self.half_width):
            return self.bounds
        return self.value - self.half_width, self.value + self.half_width

    @property
    def text(self) -> str:
        """The number with its interval as text."""
        return self.number + self.margin

    def _shown(self, value: float) -> str:
        return f"{value:,.{self.decimals}f}".replace("-", "\N{MINUS SIGN}")


Cell = Quantity | str | None


@dataclass(frozen=True)
class Table:
    """A table with a title. ``name`` is its file name; ``note`` explains how to read it."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def numeric(self, column: int) -> bool:
        """Whether the column has only numbers, which are aligned to the right."""
        cells = [row[column] for row in self.rows if row[column] is not None]
        return bool(cells) and all(isinstance(cell, Quantity) for cell in cells)

    def without_empty_columns(self) -> Table:
        """The table without columns that have no entries."""
        kept = [i for i in range(len(self.columns)) if any(row[i] is not None for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)


def to_csv(table: Table) -> str:
    """The table as CSV (RFC 4180). A column with intervals is followed by columns ``… low`` and ``… high``.

    >>> cell = Quantity(0.5, 0.25, decimals=1)
    >>> print(to_csv(Table("t", "T", ["run", "Hit@5"], [["a, b", cell]])).replace("\\r", ""), end="")
    run,Hit@5,Hit@5 low,Hit@5 high
    "a, b",0.5,0.25,0.75

    An apostrophe precedes text that a spreadsheet would treat as a formula (:func:`csv_text`).
    """
    bounded = [
        any(isinstance(row[i], Quantity) and row[i].margin for row in table.rows)  # type: ignore[union-attr]
        for i in range(len(table.columns))
    ]
    text = io.StringIO()
    writer = csv.writer(text)
    header: list[str] = []
    for column, has_bounds in zip(map(csv_text, table.columns), bounded, strict=True):
        header += [column, f"{column} low", f"{column} high"] if has_bounds else [column]
    writer.writerow(header)
    for row in table.rows:
        line: list[str] = []
        for cell, has_bounds in zip(row, bounded, strict=True):
            line += _csv_cell(cell, has_bounds)
        writer.writerow(line)
    return text.getvalue()


def _csv_cell(cell: Cell, has_bounds: bool) -> list[str]:
    if not isinstance(cell, Quantity):
        text = csv_text(cell or "")
        return [text, "", ""] if has_bounds else [text]
    value = repr(float(cell.value)) if cell.decimals else str(int(cell.value))
    if not has_bounds:
        return [value]
    if not cell.margin:
        return [value, "", ""]
    return [value, *(repr(float(end)) for end in cell.interval)]


def csv_text(text: str) -> str:
    """Make a text safe: spreadsheets do not treat it as a formula, nor terminals as a command. Numbers are
    not changed.

    >>> csv_text("=1+1"), csv_text("-5.3"), csv_text("-x")
    ("'=1+1", '-5.3', "'-x")
    """
    text = printable(text, one_line=True)
    if not text.startswith(("=", "+", "-", "@", "＝", "＋", "－", "＠")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def to_markdown(table: Table) -> str:
    """The table in GitHub-flavored Markdown, below its title. The best value is bold, values that are not
    significantly worse are marked ≈, worse ones ↓.

    >>> rows = [["a|b", Quantity(1, mark="best")], ["c", None]]
    >>> print(to_markdown(Table("t", "T", ["run", "n"], rows)), end="")
    **T**
    <BLANKLINE>
    | run | n |
    |:---|---:|
    | a\\|b | **1** |
    | c | – |
    """

    def cell(value: Cell) -> str:
        if isinstance(value, Quantity):
            return {"best": f"**{value.text}**", "tied": f"{value.text} ≈", "worse": f"{value.text} ↓"}.get(
                value.mark, value.text
            )
        if value is None:
            return ABSENT
        return re.sub(r"([\\|`*_<>\[\]~])", r"\\\1", printable(" ".join(value.split())))

    rules = ["---:" if table.numeric(i) else ":---" for i in range(len(table.columns))]
    lines = [
        f"**{cell(table.title)}**",
        "",
        "| " + " | ".join(map(cell, table.columns)) + " |",
        "|" + "|".join(rules) + "|",
        *("| " + " | ".join(map(cell, row)) + " |" for row in table.rows),
    ]
    return "\n".join([*lines, *(["", cell(table.note)] if table.note else [])]) + "\n"


def to_latex(table: Table) -> str:
    """The table as a LaTeX ``table`` environment that uses booktabs. The best value is bold, values that are
    not significantly worse are marked ≈, worse ones ↓.

    >>> rows = [["R&D_1", Quantity(0.5, 0.25, decimals=2, mark="best")]]
    >>> print(to_latex(Table("t", "100 %", ["run", "Hit@5"], rows)), end="")
    % needs \\usepackage{booktabs}
    \\begin{table}
      \\centering
      \\caption{100 \\%}
      \\label{tab:t}
      \\begin{tabular}{lr}
        \\toprule
        run & Hit@5 \\\\
        \\midrule
        R\\&D\\_1 & $\\mathbf{0.50} \\pm 0.25$ \\\\
        \\bottomrule
      \\end{tabular}
    \\end{table}
    """

    def cell(value: Cell) -> str:
        if not isinstance(value, Quantity):
            return "--" if value is None else _latex(value)
        number = value.number.replace("\N{MINUS SIGN}", "-").replace(",", "{,}")
        number = rf"\mathbf{{{number}}}" if value.mark == "best" else number
        margin = value.margin.replace("±", r"\pm").replace("\N{MINUS SIGN}", "-").replace(",", "{,}")
        margin = margin.replace(" to ", r"~\mathrm{to}~")
        mark = {"tied": r"~$\approx$", "worse": r"~$\downarrow$"}.get(value.mark, "")
        return f"${number}{margin}$" + mark

    alignment = "".join("r" if table.numeric(i) else "l" for i in range(len(table.columns)))
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{_latex(' '.join([table.title + '.' * bool(table.note), table.note]).strip())}}}",
        rf"  \label{{tab:{table.name}}}",
        rf"  \begin{{tabular}}{{{alignment}}}",
        r"    \toprule",
        "    " + " & ".join(map(cell, table.columns)) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(map(cell, row)) + r" \\" for row in table.rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "≈": r"$\approx$",
    "↓": r"$\downarrow$",
    "→": r"$\to$",
    "≤": r"$\leq$",
    "±": r"$\pm$",
    "−": r"$-$",
    "·": r"$\cdot$",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in printable(" ".join(text.split())))
