"""What clients are called."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence

from fedloom.core.protocols import ClientId

_WORDS, _COLUMNS, _BYTES = 5, 40, 80
_RESERVED = {"con", "prn", "aux", "nul"} | {
    f"{port}{i}" for port in ("com", "lpt") for i in range(10)
}
"""Names of devices, which Windows takes for no file, whatever their ending."""


def client_names(count: int) -> list[ClientId]:
    """Return client-000, client-001, ..., which sort as they count."""
    width = max(3, len(str(count - 1)))
    return [f"client-{i:0{width}d}" for i in range(count)]


def is_name(value: str) -> bool:
    """Return whether a value can name a client: up to 5 words and 40 columns, or one word of up to 80 bytes.

    Wide letters, as Chinese has them, take two columns, and words of them cannot be told apart. Anything longer reads as
    text, which no name may give away.
    """
    words = value.split()
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in value)
    alone = len(words) <= 1 and not wide and len(_bytes(value)) <= _BYTES
    return len(words) <= _WORDS and (len(value) + wide <= _COLUMNS or alone)


def fingerprint(value: str) -> str:
    """Return 12 hexadecimal digits of the SHA-256 of a value.

    Equal values have equal ones. Who guesses the value can check it: this keeps text unread, it is no secret.
    """
    return hashlib.sha256(_bytes(value)).hexdigest()[:12]


def safe_names(values: Sequence[str]) -> dict[str, ClientId]:
    """Return a name for every value that any file system takes and no two share, even where case is ignored.

    A value that is too long to be a name gives its fingerprint instead of its text.
    """
    names: dict[str, ClientId] = {}
    taken: set[str] = set()
    for value in values:
        stem = re.sub(r"[^\w.-]+", "-", value).strip("-.") or "client"
        if not is_name(value) or stem.partition(".")[0].lower() in _RESERVED:
            stem = f"client-{fingerprint(value)}"
        name, number = stem, 2
        while _folded(name) in taken:
            name, number = f"{stem}-{number}", number + 1
        taken.add(_folded(name))
        names[value] = name
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold()


def _bytes(value: str) -> bytes:
    return value.encode(errors="surrogatepass")
