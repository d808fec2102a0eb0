"""Whether two sides would build the same weights from the same messages."""

from collections.abc import Mapping

from fedloom.core.protocols import ClientError

MEANING = {
    "data": "split of the data (data.source)",
    "public": "text of the server's own (fedbiot.public)",
    "tokenizer": "tokenizer (model.name, revision; versions of transformers)",
    "template": "chat template (model.name, revision)",
    "config": "configuration of the model (model.name, revision)",
    "fedloom": "version of fedloom (install the same)",
    "wire": "version of the messages (install the same fedloom)",
    "draws": "random draws (install the same torch)",
    "recipe": "recipe (start with the same file)",
    "quantize": "scheme of the weights in few bits (model.quantize)",
    "bitsandbytes": "version of bitsandbytes (install the same)",
    "packed": "bits of the quantised weights (model.name, file, revision, dtype; install the same torch)",
    "base": "weights of the base model (model.name, file, revision, dtype, quantize)",
    "start": "weights that training starts from (model.name, tune, run.seed)",
    "tensors": "names and order of the tensors that move (tune, versions of the model's code)",
    "projection": "frozen projections of tune: vera (run.seed, tune.vera.rank; install the same torch)",
    "noise": "version of the random stream (versions of fedloom)",
    "distribution": "distribution of the directions (tune.seeds.distribution, distribution_rank)",
    "seeds": "number of directions (tune.seeds.num_seeds)",
    "seed": "seed of the directions (run.seed)",
}
SERVER_AND_SITE = ("at the server", "at the site")


def agree(
    ours: Mapping[str, str],
    theirs: Mapping[str, str],
    *,
    where: tuple[str, str] = ("here", "there"),
) -> None:
    """Refuse to work together where two identities differ: the models would part without a sound.

    Args:
        ours: What one side has.
        theirs: What the other has.
        where: What the message calls the two sides.

    Raises:
        ClientError: saying the first thing that differs, and what decides it.
    """
    for key in differing(ours, theirs):
        raise ClientError(
            f"both sides must have the same {MEANING.get(key, key)}:"
            f" {where[0]} {short(ours.get(key))}, {where[1]} {short(theirs.get(key))}"
        )


def differing(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """Return the keys in which two identities differ, in the order of MEANING."""
    known = [*MEANING, *sorted((ours.keys() | theirs.keys()) - MEANING.keys())]
    return [key for key in known if ours.get(key) != theirs.get(key)]


def short(value: str | None) -> str:
    """Return what a message shows of a hash."""
    return "none" if value is None else value[:16]
