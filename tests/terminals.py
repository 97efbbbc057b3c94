"""A terminal of so many columns, in this process: what is written to it, as its reader gets it."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import termios
import threading
from collections.abc import Iterator

TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
"""A control sequence, a control character, or text."""


class Terminal:
    """raw: all that was written, once the block is left."""

    raw = ""

    @property
    def lines(self) -> list[str]:
        """The lines as they stand there in the end, without colours."""
        screen, row, column = [""], 0, 0
        for number, command, control, text in TOKEN.findall(self.raw):
            if text:
                screen[row] = screen[row][:column].ljust(column) + text + screen[row][column + len(text) :]
                column += len(text)
            elif control == "\n":
                row, column = row + 1, 0
                screen += [""] * (row == len(screen))
            elif control or command == "A":
                row, column = row - int(number or 0) if command else row, 0
            elif command == "K":
                screen[row] = ""
        return [line.rstrip() for line in screen]


@contextlib.contextmanager
def terminal(columns: int = 80) -> Iterator[Terminal]:
    """A block in which standard output and standard error are a terminal."""
    columns_before = os.environ.pop("COLUMNS", None)  # it would be taken for the terminal's
    reading, writing = pty.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    found, parts = Terminal(), []

    def read() -> None:
        with contextlib.suppress(OSError):  # EIO: the other end was closed
            while data := os.read(reading, 1 << 16):
                parts.append(data)

    thread = threading.Thread(target=read)
    thread.start()
    try:
        with open(writing, "w", buffering=1) as file, contextlib.redirect_stdout(file):
            with contextlib.redirect_stderr(file):
                yield found
    finally:
        thread.join()
        os.close(reading)
        if columns_before is not None:
            os.environ["COLUMNS"] = columns_before
        found.raw = b"".join(parts).decode().replace("\r\n", "\n")
