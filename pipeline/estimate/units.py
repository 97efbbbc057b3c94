"""Numbers of bytes for people."""


def in_units(number: int) -> str:
    """Such as 12.3 MB: decimal units, one digit behind the point from kB on."""
    power = min(4, max(0, (len(str(number)) - 1) // 3))
    return f"{number / 1000**power:.{min(power, 1)}f} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"
