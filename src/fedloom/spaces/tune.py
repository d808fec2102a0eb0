"""What is learnt of a model: the kinds that the recipe's section `tune` chooses from."""

from collections.abc import Mapping
from typing import Protocol

from fedloom.models.build import Base
from fedloom.spaces.full import Full
from fedloom.spaces.live import Live
from fedloom.spaces.lora import LoRA
from fedloom.spaces.lora_xs import LoRAXS
from fedloom.spaces.offsite import Offsite
from fedloom.spaces.scaling_vectors import IA3, VeRA
from fedloom.spaces.seed_space import Seeds, SeedSpace
from fedloom.spaces.virtual_tokens import Prefix, Prompt, PTuning


class Tune(Protocol):
    """One kind: a frozen dataclass, whose fields are its settings and which makes the space they stand for."""

    @property
    def is_adapter(self) -> bool:
        """Return whether what is learnt stands beside a base model that stays as it is, so that it fits others too."""
        ...

    @property
    def is_seed_space(self) -> bool:
        """Return whether params are coefficients of random directions, not the values of tensors."""
        ...

    @property
    def virtual_tokens(self) -> int:
        """Return how many learnt tokens stand before every row, which takes as many of the model's positions."""
        ...

    @property
    def title(self) -> str:
        """Return what a report calls it."""
        ...

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> Live | SeedSpace:
        """Return the space over the base model, which it changes in place: one space a model.

        Args:
            base: The model.
            seed: Of fresh tensors, and of directions.
            decays: Whether clients' zeroth-order steps shrink the weights themselves, which seed space keeps as a
                coordinate.

        Raises:
            ValueError: Where a name stands for nothing in the model, or its weights cannot be learnt this way.
        """
        ...


TUNES: Mapping[str, type[Tune]] = {
    "lora": LoRA,
    "lora_xs": LoRAXS,
    "prompt": Prompt,
    "prefix": Prefix,
    "ptuning": PTuning,
    "ia3": IA3,
    "vera": VeRA,
    "offsite": Offsite,
    "full": Full,
    "seeds": Seeds,
}


def leaves_weights(tune: Tune) -> bool:
    """Return whether the weights of a base model stay as they are while this is learnt of it, so that others may share them."""
    pissa = isinstance(tune, LoRA) and tune.init == "pissa"
    return tune.is_adapter and not pissa and not isinstance(tune, Offsite)
