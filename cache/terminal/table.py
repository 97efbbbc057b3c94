"""Tables: aligned, within the terminal's width, and a line for each row where there is no terminal."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from cache.core.text import printable
from cache.terminal.output import console, is_terminal, style_of

GAP = "  "
MOST_ROWS = 1000
"""Longer tables are not fitted into the terminal's width: rich would take minutes for a million rows."""


class Table:
    """Rows of cells under the names of their columns, for `output.show`.

    columns: names; one that begins with ">" is right-aligned, as numbers are. Without any name no heading is shown.
    cells: anything that str() takes; `output.good`, `bad`, ... give it a colour. ``str(table)`` is plain text.
    hides: columns that are left out where no row says anything in them, which "", "-" and "0" do not. ::

        show(Table(["file", ">tokens", ">used"], [("cat.txt", 600, bad(512))]))
    """

    def __init__(self, columns: Sequence[str], rows: Iterable[Sequence[object]], hides: Sequence[str] = ()):
        self.rows = [list(row) for row in rows]
        silent = [
            place
            for place, name in enumerate(columns)
            if name in hides and all(str(row[place]) in ("", "-", "0") for row in self.rows)
        ]
        self.columns = [name for place, name in enumerate(columns) if place not in silent]
        self.rows = [[cell for place, cell in enumerate(row) if place not in silent] for row in self.rows]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    def lines(self) -> Iterator[str]:
        """As plain text, each row in one line, as wide as it needs to be."""
        from rich.cells import cell_len  # a Chinese character is two columns wide

        cells = [*self._heading(), *([printable(str(cell)) for cell in row] for row in self.rows)]
        widths = [max(map(cell_len, column)) for column in zip(*cells)]
        for row in cells:
            blanks = [" " * (width - cell_len(cell)) for width, cell in zip(widths, row)]
            aligned = [
                blank + cell if name.startswith(">") else cell + blank
                for name, blank, cell in zip(self.columns, blanks, row)
            ]
            yield GAP.join(aligned).rstrip()

    def _heading(self) -> list[list[str]]:
        names = [name.removeprefix(">") for name in self.columns]
        return [names] if any(names) else []

    def print(self, stream: TextIO) -> None:
        """Print it to a terminal as wide as that is, in colours; elsewhere as plain text."""
        if is_terminal(stream) and len(self.rows) <= MOST_ROWS:
            console(stream).print(self)
        else:
            for line in self.lines():
                print(line, file=stream)

    def __rich__(self):
        from rich.table import Table
        from rich.text import Text

        fitted = Table(box=None, padding=(0, len(GAP), 0, 0), pad_edge=False, show_header=bool(self._heading()))
        for name in self.columns:
            title = Text(name.removeprefix(">"), "bold")
            fitted.add_column(title, justify="right" if name.startswith(">") else "left", overflow="fold")
        for row in self.rows:
            fitted.add_row(*(Text(printable(str(cell)), style_of(cell)) for cell in row))
        return fitted
