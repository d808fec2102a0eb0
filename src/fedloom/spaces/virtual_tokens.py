"""Learnt tokens before every row of a frozen base model: the kinds prompt, prefix and ptuning.

None of them starts at the base model, as the others do. What clients learn and the server takes the mean of are the
encoder's parameters, not what it makes of them.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from fedloom.models.build import Base
from fedloom.models.virtual_tokens import attach_prefix, attach_prompt, attach_ptuning
from fedloom.spaces.adapter import AdapterSpace


@dataclass(frozen=True, slots=True)
class Prompt:
    """Learn the embeddings of tokens before every row.

    The Power of Scale for Parameter-Efficient Prompt Tuning. Lester, Al-Rfou, Constant, EMNLP 2021 (arXiv:2104.08691).
    """

    tokens: int = 20
    """How many."""
    init: Literal["vocabulary", "text", "normal"] = "vocabulary"
    """What they start as: tokens drawn from the vocabulary, those of `text`, or noise as large as embeddings are."""
    text: str = ""
    """What they say at the start, as often as it takes; for init text."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check_tokens(self.tokens, "prompt")
        if self.init not in ("vocabulary", "text", "normal"):
            raise ValueError(
                f"tune.prompt.init must be vocabulary, text or normal, got {self.init}"
            )
        if (self.init == "text") != bool(self.text):
            raise ValueError(
                "tune.prompt.text belongs to tune.prompt.init text, and that to a text, got init"
                f" {self.init} and text {self.text!r}"
            )

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

    @property
    def title(self) -> str:
        return f"prompt, {self.tokens} virtual tokens"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = attach_prompt(base, tokens=self.tokens, init=self.init, text=self.text, seed=seed)
        return AdapterSpace(base, adapter)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Learn keys and values that every layer attends to before every row.

    Prefix-Tuning: Optimizing Continuous Prompts for Generation. Li, Liang, ACL 2021 (arXiv:2101.00190); without a projection
    as in P-Tuning v2 (Liu et al. 2022, arXiv:2110.07602).
    """

    tokens: int = 20
    """How many."""
    projection: bool = False
    """Learn vectors and an MLP that makes keys and values of them, instead of those themselves."""
    hidden: int | None = None
    """Width of that MLP; None: that of the keys."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check_tokens(self.tokens, "prefix")
        if self.hidden is not None and not self.projection:
            raise ValueError(
                f"tune.prefix.hidden belongs to tune.prefix.projection true, got {self.hidden}"
            )
        _check_hidden(self.hidden, "prefix")

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

    @property
    def title(self) -> str:
        how = ", projected" if self.projection else ""
        return f"prefix, {self.tokens} virtual tokens{how}"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = attach_prefix(
            base, tokens=self.tokens, projection=self.projection, hidden=self.hidden, seed=seed
        )
        return AdapterSpace(base, adapter)


@dataclass(frozen=True, slots=True)
class PTuning:
    """Learn an encoder that makes the embeddings of tokens before every row.

    GPT Understands, Too. Liu, Zheng, Du, Ding, Qian, Yang, Tang 2021 (arXiv:2103.10385).
    """

    tokens: int = 20
    """How many."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """An MLP of three layers, or a bidirectional LSTM with an MLP of two behind it."""
    hidden: int | None = None
    """Width of the encoder; None: the model's."""
    layers: int = 2
    """Of the LSTM."""

    is_adapter: ClassVar[bool] = True
    is_seed_space: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        _check_tokens(self.tokens, "ptuning")
        if self.encoder not in ("mlp", "lstm"):
            raise ValueError(f"tune.ptuning.encoder must be mlp or lstm, got {self.encoder}")
        if self.layers < 1:
            raise ValueError(f"tune.ptuning.layers must be at least 1, got {self.layers}")
        if self.encoder == "mlp" and self.layers != 2:
            raise ValueError(
                f"tune.ptuning.layers belongs to tune.ptuning.encoder lstm, got {self.layers} with mlp"
            )
        _check_hidden(self.hidden, "ptuning")

    @property
    def virtual_tokens(self) -> int:
        return self.tokens

    @property
    def title(self) -> str:
        return f"ptuning, {self.tokens} virtual tokens, {self.encoder}"

    def make_space(self, base: Base, *, seed: int, decays: bool = False) -> AdapterSpace:
        adapter = attach_ptuning(
            base,
            tokens=self.tokens,
            encoder=self.encoder,
            hidden=self.hidden,
            layers=self.layers,
            seed=seed,
        )
        return AdapterSpace(base, adapter)


def _check_tokens(tokens: int, kind: str) -> None:
    if tokens < 1:
        raise ValueError(f"tune.{kind}.tokens must be at least 1, got {tokens}")


def _check_hidden(hidden: int | None, kind: str) -> None:
    if hidden is not None and hidden < 1:
        raise ValueError(f"tune.{kind}.hidden must be at least 1, got {hidden}")
