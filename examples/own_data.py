"""Rows, a loaded model, a metric and a callback of one's own, all given as objects."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import fedloom

BUNDLED = Path(fedloom.__file__).parent / "models" / "tiny"

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
    if loss < 0.05:
        finished.stop()


def main() -> None:
    """Train two clients on half of the capitals each."""
    names = list(CAPITALS)
    data = {
        site: {"train": rows(some), "validation": rows(some[:2]), "test": rows(some)}
        for site, some in {"north": names[:6], "south": names[6:]}.items()
    }
    # Any causal language model and its tokenizer; these two come with the package.
    model = AutoModelForCausalLM.from_pretrained(BUNDLED)
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED)
    result = fedloom.run(
        "quickstart",
        data=data,
        model=(model, tokenizer),
        metrics=[fedloom.Metric("error_rate", "Error rate", better="lower", score=wrong)],
        callbacks=[watch],
        overrides=["run.rounds=8", "run.baselines=[]", "local.steps=6", "evaluation.every=1"],
    )
    print(
        f"error rate {result.summary['final']['test/error_rate']:.2f}, adapter in {result.adapter()}"
    )


if __name__ == "__main__":
    main()
