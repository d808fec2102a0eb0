"""Gather freely licensed general text for pre-training, one file a source, one document a line or block.

WordNet glosses (WordNet licence), the King James Bible (public domain), Python's standard library (PSF licence) and
the names of places, languages, days and months of the Unicode CLDR (Unicode licence) in many scripts. Sentences that
ask are left out: fine-tuning is to teach the form of question and answer.
"""

import argparse
import json
import random
import re
from pathlib import Path

SEED = 20
SEPARATOR = "\n\n"

CLDR_LOCALES = (
    "ar",
    "am",
    "bg",
    "bn",
    "cs",
    "el",
    "et",
    "fa",
    "fi",
    "fr",
    "ga",
    "he",
    "hi",
    "hr",
    "hu",
    "hy",
    "id",
    "is",
    "it",
    "ja",
    "ka",
    "kk",
    "ko",
    "lt",
    "lv",
    "mn",
    "mr",
    "nb",
    "nl",
    "pl",
    "ro",
    "ru",
    "sk",
    "sl",
    "sq",
    "sr",
    "sw",
    "ta",
    "te",
    "th",
    "tr",
    "uk",
    "ur",
    "uz",
    "vi",
    "zh",
    "zu",
)


def glosses(folder: Path) -> list[str]:
    """Return "word: definition; examples" for every synonym set of WordNet."""
    documents = []
    for part in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{part}").read_text(encoding="utf-8").splitlines():
            if line.startswith(" ") or "?" in line:
                continue
            head, gloss = line.split(" | ", 1)
            fields = head.split()
            words = [fields[4 + 2 * k].replace("_", " ") for k in range(int(fields[3], 16))]
            documents.append(f"{', '.join(words)}: {gloss.strip()}")
    return documents


def verses(file: Path) -> list[str]:
    """Return passages of four verses from a file with one verse a line."""
    lines = [
        line.split(" ", 1)[1].strip()
        for line in file.read_text(encoding="utf-8").splitlines()
        if " " in line
    ]
    lines = [re.sub(r"\s+", " ", line) for line in lines if "?" not in line]
    return [" ".join(lines[k : k + 4]) for k in range(0, len(lines), 4)]


def programs(folder: Path) -> list[str]:
    """Return passages of forty lines from Python source files."""
    documents = []
    for file in sorted(folder.glob("*.py")):
        lines = file.read_text(encoding="utf-8", errors="ignore").splitlines()
        for k in range(0, len(lines), 40):
            kept = [line for line in lines[k : k + 40] if line.strip() and "?" not in line]
            documents.append("\n".join(kept))
    return documents


def limited(documents: list[str], limit_bytes: int) -> list[str]:
    """Return a seeded choice of documents up to a size."""
    chosen, size = [], 0
    for document in random.Random(SEED).sample(documents, len(documents)):
        size += len(document.encode())
        if size > limit_bytes:
            break
        chosen.append(document)
    return chosen


def display_names() -> list[str]:
    """Return lists of display names from locale tables that babel ships, ten names a line."""
    from babel import Locale

    documents = []
    for code in CLDR_LOCALES:
        locale = Locale.parse(code)
        names = [*locale.territories.values(), *locale.languages.values()]
        names += locale.months["format"]["wide"].values()
        names += locale.days["format"]["wide"].values()
        documents += [", ".join(names[k : k + 10]) for k in range(0, len(names), 10)]
    return documents


def main() -> None:
    """Parse the command line and write one file a source."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wordnet", type=Path, help="folder with data.noun, data.verb, data.adj, data.adv"
    )
    parser.add_argument(
        "--bible", type=Path, help="King James Bible, one verse a line, reference first"
    )
    parser.add_argument("--python", type=Path, help="folder of Python's standard library")
    parser.add_argument("--limit-bytes", type=int, default=800_000, help="of one source")
    parser.add_argument(
        "--cldr", action="store_true", help="display names from the installed babel"
    )
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    sources: dict[str, list[str]] = {}
    if arguments.wordnet:
        sources["wordnet"] = glosses(arguments.wordnet)
    if arguments.bible:
        sources["bible"] = verses(arguments.bible)
    if arguments.python:
        sources["python"] = programs(arguments.python)
    if arguments.cldr:
        sources["cldr"] = display_names()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, documents in sources.items():
        chosen = limited(documents, arguments.limit_bytes)
        file = arguments.out / f"{name}.txt"
        file.write_text(SEPARATOR.join(chosen) + "\n", encoding="utf-8")
        print(json.dumps({"source": name, "documents": len(chosen), "bytes": file.stat().st_size}))


if __name__ == "__main__":
    main()
