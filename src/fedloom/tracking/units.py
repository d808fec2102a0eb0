"""Numbers as people read them."""


def human_bytes(count: float) -> str:
    """Return a byte count in decimal units, three digits: 1234567 -> 1.23 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    if unit == "B":
        return f"{count:.0f} B"
    digits = 2 if count < 10 else 1 if count < 100 else 0
    return f"{count:.{digits}f} {unit}"
