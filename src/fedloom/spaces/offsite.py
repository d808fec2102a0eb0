"""Kind offsite: the first and last layers learn around an emulator of the others, which clients never have.

Offsite-Tuning: Transfer Learning without Full Model. Xiao, Lin, Han 2023 (arXiv:2302.04870), federated as FedOT in
FederatedScope-LLM (Kuang et al., KDD 2024, arXiv:2309.00363).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, get_args

from fedloom.core.emulation import EmulatorShape
from fedloom.core.protocols import Params
from fedloom.core.ranks import Ranks
from fedloom.models.adapters import Adapter, trainable
from fedloom.models.build import Base, write_model
from fedloom.models.emulator import Emulator, Rule
from fedloom.models.quantized import check_unquantized, scheme_of
from fedloom.models.targets import choose_targets
from fedloom.spaces.full import Full, check_learnable_type
from fedloom.spaces.live import Live, learnable
from fedloom.spaces.lora import LoRA

OffsiteAdapter = LoRA | Full
ADAPTERS: Mapping[str, type] = {"lora": LoRA, "full": Full}


@dataclass(frozen=True, slots=True)
class Offsite:
    """Learn the first and last layers around an emulator of those between them, whose middle stays at the server."""

    left: int = 2
    """First layers that learn."""
    right: int = 2
    """Last layers that learn."""
    drop: float = 0.5
    """Share of the layers between them that the emulator leaves out, [0, 1); with 0 clients have the whole model."""
    rule: Rule = "floor"
    """Which of them it keeps, evenly spread: places between two layers go down, or to the nearest."""
    int8: bool = False
    """Hold the linear layers of what is kept in eight bits: less memory, and weights that clients have by their rounding."""
    factors: int = 0
    """Rank of factors beside the emulator's layers, which algorithm `fedbiot` learns at the server; 0: it stays as it is."""
    adapter: OffsiteAdapter = LoRA()
    """What learns of the first and last layers: low-rank adapters on them, or their weights."""

    is_seed_space: ClassVar[bool] = False
    virtual_tokens: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        for name, value in (("left", self.left), ("right", self.right), ("factors", self.factors)):
            if value < 0:
                raise ValueError(f"tune.offsite.{name} must be at least 0, got {value}")
        if not self.left + self.right:
            raise ValueError("tune.offsite.left or right must be at least 1: no layer would learn")
        if not 0 <= self.drop < 1:
            raise ValueError(f"tune.offsite.drop must be in [0, 1), got {self.drop}")
        if self.rule not in get_args(Rule):
            raise ValueError(f"tune.offsite.rule must be floor or round, got {self.rule}")
        if isinstance(self.adapter, Full) and self.adapter.weights:
            raise ValueError(
                "tune.offsite.adapter.full.weights must be left out: the layers that learn are those of left and right"
            )
        if isinstance(self.adapter, LoRA) and self.adapter.modules_to_save:
            raise ValueError(
                "tune.offsite.adapter.lora.modules_to_save must be left out: nothing beside the first and last layers"
                " learns"
            )

        if isinstance(self.adapter, LoRA) and self.adapter.ranks and self.factors:
            raise ValueError(
                "tune.offsite.adapter.lora.ranks must be left out where tune.offsite.factors are: a smaller rank's scale"
                " would be theirs too"
            )
        if isinstance(self.adapter, LoRA) and self.adapter.init != "kaiming":
            raise ValueError(
                "tune.offsite.adapter.lora.init must be kaiming: clients and server have the same weights beside it"
            )

    @property
    def is_adapter(self) -> bool:
        """Return whether what is learnt stands beside weights that stay as they are."""
        return isinstance(self.adapter, LoRA)

    @property
    def title(self) -> str:
        kept = f"{100 * (1 - self.drop):.0f} % of the middle" + (" in int8" if self.int8 else "")
        return f"offsite, {self.left} + {self.right} layers around {kept}, {self.adapter.title}"

    @property
    def adapters(self) -> Ranks | None:
        """Return how wide clients' adapters are, where they are low-rank."""
        return self.adapter.adapters if isinstance(self.adapter, LoRA) else None

    @property
    def emulator(self) -> EmulatorShape:
        """Return which tensors of the emulator move, for the algorithm that moves them."""
        return EmulatorShape(self.left, self.right, self.factors)

    def emulate(self, base: Base) -> Emulator:
        """Let a model stand as an emulator, in place.

        Raises:
            ValueError: where it has too few layers, or holds the emulator of other settings.
        """
        scheme = scheme_of(base.model)
        if self.int8 and scheme is not None:
            raise ValueError(
                f"tune.offsite.int8 has no effect where model.quantize is {scheme.name}, which holds all layers so: leave"
                " it out"
            )
        return Emulator(
            base.model,
            left=self.left,
            right=self.right,
            drop=self.drop,
            rule=self.rule,
            int8=self.int8,
            folder=base.name,
        )

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> "OffsiteSpace":
        if isinstance(self.adapter, Full):
            check_learnable_type(base.model, setting="tune.offsite.adapter")
        emulator = self.emulate(base)
        shared = emulator.disclosed
        adapter, left_frozen = None, ""
        if isinstance(self.adapter, LoRA):
            adapter = self.adapter.attach(base, self._targets(base, emulator), seed=seed)
        else:
            names = emulator.adapter_modules()
            tensors, left_frozen = learnable(base.model, names, path="tune.offsite.adapter.full")
            for parameter in tensors.values():
                parameter.requires_grad_(True)
        if self.factors:
            emulator.attach_factors(self.factors, seed=seed)
        return OffsiteSpace(
            base, self, emulator, adapter, left_frozen=left_frozen, disclosed=shared
        )

    def _targets(self, base: Base, emulator: Emulator) -> Sequence[str]:
        """Return the full names of the layers that get an adapter."""
        assert isinstance(self.adapter, LoRA)
        path = "tune.offsite.adapter.lora.targets"
        chosen = choose_targets(base.model, self.adapter.targets, path=path)
        found = sorted(name for name in chosen.layers if emulator.is_adapter(f"{name}."))
        if not found:
            raise ValueError(
                f"{path} must name linear layers of the first and last layers, got {self.adapter.targets}"
            )
        # `fedbiot`, which knows names alone, counts the last layers from the last one that learns.
        last = emulator.adapter_modules()[-1]
        if self.factors and self.right and not any(name.startswith(f"{last}.") for name in found):
            raise ValueError(
                f"{path} must name a linear layer of the last layer too where tune.offsite.factors are, got"
                f" {self.adapter.targets}: name one, or let no last layer learn (tune.offsite.right: 0)"
            )
        return found


class OffsiteSpace(Live):
    """The tensors of the first and last layers that learn, and of the factors beside the emulator where there are any."""

    def __init__(
        self,
        base: Base,
        settings: Offsite,
        emulator: Emulator,
        adapter: Adapter | None,
        *,
        left_frozen: str,
        disclosed: float | None,
    ) -> None:
        self.emulator, self.disclosed = emulator, disclosed
        self._base, self._settings, self._adapter = base, settings, adapter
        inner = settings.adapter
        super().__init__(
            base.model,
            trainable(base.model),
            origin=inner.origin,
            left_frozen=left_frozen,
            dropout=inner.dropout if isinstance(inner, LoRA) else 0.0,
            identity=adapter.identity if adapter else {},
        )

    @property
    def is_whole_here(self) -> bool:
        """Return whether this process has the layers that clients have not."""
        return self.emulator.is_whole_here

    def whole(self) -> AbstractContextManager[None]:
        """Let the model stand whole for a while, with the same tensors that learn."""
        return self.emulator.whole()

    def split(self, params: Params) -> tuple[Params, Params]:
        """Return the tensors that clients learn, and the emulator's factors."""
        factors = {n: t for n, t in params.items() if self.emulator.is_middle(n)}
        return {n: t for n, t in params.items() if n not in factors}, factors

    def save_emulator(self, folder: Path) -> None:
        """Write what clients have of the model before anything is learnt, as a folder that transformers load.

        What is in eight bits is there as whole numbers, with what their rows are multiplied by in a file of its own.

        Raises:
            ValueError: where the model itself is held in few bits, which a folder is not.
        """
        if not self._settings.int8:
            check_unquantized(
                self.model,
                "where sites are handed an emulator: rounded once more there, its weights would be others",
            )
        whole = self.emulator.integers(folder) if self._settings.int8 else nullcontext()
        with self.standing_at(self.start()), self.emulator.alone(), whole:
            write_model(self._base, folder)

    def save(self, folder: Path, params: Params) -> None:
        """Write what was learnt for the whole model, by name: the folder of an adapter, or the model."""
        if self._adapter is None:
            self.save_merged(folder, params)
            return
        with self.whole():
            self._adapter.save(folder, self.split(self.absolute(params))[0])

    def save_merged(self, folder: Path, params: Params) -> None:
        self.load(params)
        with self.whole():
            if self._adapter is None:
                write_model(self._base, folder)
            else:
                self._adapter.save_merged(folder, self._base.tokenizer)
