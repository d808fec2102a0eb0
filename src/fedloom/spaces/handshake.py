"""Whether two sides would build the same weights from the same messages."""

from collections.abc import Mapping

from fedloom.core.protocols import Refusal

MEANING = {
    "fedloom": "version of fedloom (install the same on both)",
    "wire": "version of the messages (install the same fedloom on both)",
    "draws": "random draws (install the same version of torch on both)",
    "recipe": "recipe (start both with the same file)",
    "base": "weights of the base model (model.name, revision, dtype, quantize; clear older copies)",
    "start": "weights that training starts from (model.name, tune, run.seed)",
    "tensors": "names and order of the model's tensors (install the same transformers and peft)",
    "noise": "version of the random stream (install the same fedloom on both)",
    "law": "law of the directions (tune.law, law_rank)",
    "seeds": "number of directions (tune.num_seeds)",
    "seed": "seed of the directions (run.seed)",
}


def agree(server: Mapping[str, str], site: Mapping[str, str]) -> None:
    """Refuse to work together where two identities differ: the models would part without a sound.

    Raises:
        Refusal: saying the first thing that differs, and what to do about it.
    """
    for key in [*MEANING, *sorted((server.keys() | site.keys()) - MEANING.keys())]:
        if server.get(key) != site.get(key):
            raise Refusal(
                f"both sides must have the same {MEANING.get(key, key)}:"
                f" {_short(server.get(key))} at the server, {_short(site.get(key))} at the site"
            )


def _short(value: str | None) -> str:
    return "none" if value is None else value[:16]
