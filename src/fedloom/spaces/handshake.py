"""Whether two sides would build the same weights from the same coefficients."""

from collections.abc import Mapping

from fedloom.core.protocols import Refusal

MEANING = {
    "base": "weights of the base model (model.name, revision, dtype, quantize)",
    "tensors": "names and order of the tensors that move (tune.weights, versions of the model's code)",
    "noise": "version of the random stream (versions of fedloom)",
    "law": "law of the directions (tune.law, law_rank)",
    "seeds": "number of directions (tune.num_seeds)",
    "seed": "seed of the directions (run.seed)",
}


def agree(ours: Mapping[str, str], theirs: Mapping[str, str]) -> None:
    """Refuse to work together where two identities of a space differ: the models would part without a sound.

    Raises:
        Refusal: saying the first thing that differs.
    """
    for key in [*MEANING, *sorted((ours.keys() | theirs.keys()) - MEANING.keys())]:
        if ours.get(key) != theirs.get(key):
            raise Refusal(
                f"both sides must have the same {MEANING.get(key, key)}:"
                f" here {_short(ours.get(key))}, there {_short(theirs.get(key))}"
            )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:16]
