"""The text of a file, packed or not, in any encoding that says which one it is."""

import codecs
import gzip
import zlib
from pathlib import Path

_GZIP = b"\x1f\x8b"
# UTF-32's mark begins with UTF-16's, so it is asked for first.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def read_text(path: Path) -> str:
    """Return the text of a file: gzip is known by its first bytes, UTF-16 and UTF-32 by their mark; else it is UTF-8.

    Raises:
        ValueError: with the file, and the line that is not in its encoding.
    """
    raw = path.read_bytes()
    if raw.startswith(_GZIP):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is gzip, but cut short or broken: {error}") from error
    elif raw and path.name.lower().endswith(".gz"):
        raise ValueError(f"{path} ends in .gz, but is not gzip: take .gz off its name")
    encoding = next((name for mark, name in _MARKS if raw.startswith(mark)), "utf-8")
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        before = error.object[: error.start].decode(encoding, "ignore")
        name = encoding.removesuffix("-sig").upper()
        raise ValueError(
            f"{path}, line {before.count(chr(10)) + 1}: not {name} (byte 0x{error.object[error.start]:02x}); "
            "save the file as UTF-8"
        ) from error
