"""Languages in conflict on a real model: all clients ask the same in English, and each wants the answer in its own language.

    python benchmarks/real/conflict.py --data FOLDER [--model FILE] [--seeds 0,1,2] [--part 0/2] [--table]

FOLDER holds XQuAD, a file a language, with the same questions in all; asked are those whose answers differ in all four
languages, so no bare numbers. A prompt is the English question and the English
sentence with the answer; the answer is that of the client's language. Nothing in a prompt tells which that is, so that one
model for all has to guess, where a model for each language does not; all of them can learn from each other where answers
begin, how long they are, and what is asked for. Two clients of each of four languages.
"""

import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runs import MODELS, Line, Lines, Tree, beside, first, grid, last, main

from intervals import interval

BASE = "one model (FedAvg)"
LANGUAGES = ("ar", "de", "ru", "zh")
ENDS = ".!?\n"


def questions(file: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the question, the sentence with the answer, and the answer."""
    for article in json.loads(file.read_text(encoding="utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            text = paragraph["context"]
            for each in paragraph["qas"]:
                answer = each["answers"][0]
                start, stop = (
                    answer["answer_start"],
                    answer["answer_start"] + len(answer["text"]),
                )
                begin = max(text.rfind(f"{end} ", 0, start) for end in ENDS) + 1
                ends = [at for end in ENDS if (at := text.find(f"{end} ", stop)) >= 0]
                sentence = text[begin : min(ends, default=len(text)) + 1].strip()
                yield each["question"], sentence, answer["text"]


def rows(folder: Path) -> str:
    """Return a file with a row a question and language, of the questions whose answers differ in all languages."""
    asked = list(questions(folder / "xquad.en.json"))
    answers = {at: [a for *_, a in questions(folder / f"xquad.{at}.json")] for at in LANGUAGES}
    apart = [len(set(each)) == len(LANGUAGES) for each in zip(*answers.values(), strict=True)]
    made = Path(tempfile.mkdtemp(prefix="conflict-")) / "rows.jsonl"
    with made.open("w", encoding="utf-8") as out:
        for language, wanted in answers.items():
            for (question, sentence, _), answer, kept in zip(asked, wanted, apart, strict=True):
                row = {"instruction": question, "input": sentence, "output": answer}
                if kept:
                    out.write(json.dumps({**row, "language": language}) + "\n")
    return str(made)


def arm(source: str, model: str, algorithm: Any, *, before: bool) -> Tree:
    """Return a recipe; the model before training is one for all, so that one arm measures it."""
    return {
        "model": {"name": model},
        "algorithm": algorithm,
        "data": {
            "source": source,
            "num_clients": 2 * len(LANGUAGES),
            "num_examples": 960,
            "partition": {"clusters": {"by": "language"}},
            "prompt": "plain",
            "max_length": 112,
            "truncate": "prompt",
            "fractions": [0.8, 0.0, 0.2],
        },
        "tune": {"lora": {"rank": 8, "alpha": 16, "targets": "all-linear"}},
        "local": {"optimizer": "adamw", "lr": 1e-3, "steps": 4, "batch_size": 2},
        "evaluation": {
            "every": 0,
            "before": before,
            "validation": False,
            "max_examples": 16,
            "max_new_tokens": 16,
            "metrics": ["exact_match", "rouge1", "chrf"],
        },
        "run": {"rounds": 8, "samples": 0, "keep_checkpoints": 1},
    }


def arms(folder: str, model: str) -> Mapping[str, Tree]:
    """Return the rows of the table."""
    source = rows(Path(folder))

    def clustered(pool: str, **more: Any) -> list[Any]:
        return [{"clustered": {"share": {"pool": pool}, "label": "language", **more}}, "fedavg"]

    of = {
        BASE: "fedavg",
        "clusters, apart": clustered("off"),
        "clusters, pooled": clustered("on"),
        "by language, apart": clustered("off", mode={"given": {"by": "language"}}),
    }
    return {
        name: arm(source, model, algorithm, before=name == BASE) for name, algorithm in of.items()
    }


def shares(line: Line) -> float | None:
    """Return the mean lambda of the last round."""
    told = [each["server/lambda"] for each in line["server"] if "server/lambda" in each]
    return told[-1] if told else None


def page(lines: Lines) -> str:
    """Return the table."""
    base = lines.get(BASE, {})
    cells = []
    for name, runs in lines.items():
        ended = list(runs.values())
        rands = [line["server"][-1].get("server/adjusted_rand") for line in ended]
        lambdas = [share for line in ended if (share := shares(line)) is not None]
        cells.append(
            (
                name,
                str(len(runs)),
                interval([last(line) for line in ended]),
                "" if name == BASE or not base else f"{interval(beside(runs, base), 1)} %",
                *(
                    interval([last(line, m) for line in ended])
                    for m in ("exact_match", "rouge1", "chrf")
                ),
                "" if None in rands else f"{statistics.fmean(rands):.2f}",
                f"{statistics.fmean(lambdas):.3f}" if lambdas else "",
            )
        )
    columns = (
        *("arm", "seeds", "loss after", "beside one model, paired"),
        *("exact match", "F1 of words", "chrF", "adjusted Rand", "lambda, last"),
    )
    untrained = interval([first(line) for line in base.values()]) if base else "not measured"
    return (
        "Test loss, nats a token of the answers; 16 test rows a client. Before training it is"
        f" {untrained}.\n\n{grid(columns, cells)}"
    )


if __name__ == "__main__":
    main(
        "conflict",
        "How much clusters share where languages conflict: XQuAD asked in English, answered in four languages",
        arms,
        page,
        model=str(MODELS / "gemma3-270m.gguf"),
        data="xquad",
        doc=__doc__,
    )
