"""Text of others on its way to a terminal."""


def printable(text: str) -> str:
    """Escape what could garble a terminal, begin a line, or hide a part of a name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def printable_lines(text: str) -> str:
    """As `printable`, of a message of several lines."""
    return "\n".join(map(printable, text.split("\n")))
