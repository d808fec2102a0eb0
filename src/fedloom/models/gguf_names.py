"""What llama.cpp calls the tensors of a model, and how it lays them out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

ARCHITECTURES = {
    "llama": "llama",
    "gemma3_text": "gemma3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
}
"""transformers' type of a model -> llama.cpp's architecture, of those that are written here and that transformers reads."""
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class GgufNames:
    """Of one model."""

    architecture: str
    config: Any
    """transformers' configuration of the model."""
    lookup: Callable[[str], str | None]
    """A module's name -> llama.cpp's, None where it has none."""

    @classmethod
    def of(cls, config: Any) -> "GgufNames":
        """Return the names for a model of this configuration.

        Raises:
            ValueError: where the architecture is none that is written here.
        """
        from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

        known = ARCHITECTURES.get(config.model_type)
        if known is None:
            raise ValueError(
                f"a GGUF is written of models of type {', '.join(ARCHITECTURES)}, got {config.model_type}: export with"
                " --for merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py"
            )
        (arch,) = (arch for arch, name in MODEL_ARCH_NAMES.items() if name == known)
        return cls(known, config, get_tensor_name_map(arch, config.num_hidden_layers).get_name)

    @property
    def is_tied(self) -> bool:
        """Return whether the head is the embedding."""
        return bool(self.config.tie_word_embeddings)

    def of_tensor(self, name: str) -> str:
        """Return what a tensor of the model is called.

        Raises:
            ValueError: where llama.cpp has no such tensor.
        """
        module, _, kind = name.rpartition(".")
        found = self.lookup(module) if kind in ("weight", "bias") else None
        if found is None:
            raise ValueError(
                f"llama.cpp has no tensor for {name} in a model of architecture {self.architecture}: export with"
                " --for merged or --for peft"
            )
        return f"{found}.{kind}"

    def laid_out(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the model, or the factor B of one, as llama.cpp has it: (out, ...)."""
        if self.architecture == "llama":
            for part, heads in (
                ("q_proj", self.config.num_attention_heads),
                ("k_proj", self.config.num_key_value_heads),
            ):
                if f".{part}." in name:
                    # Rotary pairs lie side by side there, and half a head apart in transformers.
                    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
                    return halves.swapaxes(1, 2).reshape(tensor.shape)
        if self.architecture == "gemma3" and name.endswith("norm.weight"):
            return tensor + 1
        return tensor
