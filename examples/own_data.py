"""Rows, a loaded model, a metric and a callback of one's own, all given as objects."""

from collections.abc import Sequence

import fedloom
from fedloom.models.base_model import ModelSettings, load_base

CAPITALS = {
    "Greece": "Athens", "Japan": "Tokyo", "Kenya": "Nairobi", "Norway": "Oslo", "Peru": "Lima", "Spain": "Madrid",
    "Chile": "Santiago", "Egypt": "Cairo", "France": "Paris", "India": "New Delhi", "Italy": "Rome", "Cuba": "Havana",
}  # fmt: skip


def rows(countries: Sequence[str]) -> list[dict[str, str]]:
    """Return a question and an answer a country; prompt and completion are the words of the columns."""
    return [
        {"prompt": f"What is the capital of {country}?", "completion": CAPITALS[country]}
        for country in countries
    ]


def wrong(answer: str, references: Sequence[str]) -> float:
    """Return 1 where the answer is none of the references."""
    return float(answer not in references)


def watch(finished: fedloom.FinishedRound) -> None:
    """Print each round, and stop once the loss is low."""
    loss = finished.metrics["train/loss"]
    print(f"round {finished.number}: training loss {loss:.3f}")
    if loss < 0.5:
        finished.stop()


def main() -> None:
    """Train two clients on half of the capitals each."""
    names = list(CAPITALS)
    data = {
        site: {"train": rows(some), "validation": rows(some[:2]), "test": rows(some)}
        for site, some in {"north": names[:6], "south": names[6:]}.items()
    }
    base = load_base(ModelSettings())  # any transformers model and tokenizer will do
    result = fedloom.run(
        "quickstart",
        data=data,
        model=(base.model, base.tokenizer),
        metrics=[fedloom.Metric("error_rate", "Error rate", better="lower", score=wrong)],
        callbacks=[watch],
        overrides=["run.rounds=8", "run.baselines=[]", "local.steps=6", "evaluation.every=4"],
    )
    print(
        f"error rate {result.summary['final']['test/error_rate']:.2f}, adapter in {result.adapter()}"
    )


if __name__ == "__main__":
    main()
