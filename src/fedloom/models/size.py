"""How large a model is, told from its configuration, before any weight is read."""

import torch

from fedloom.models.base_model import DTYPES, ModelSettings, load_config
from fedloom.models.found import found


def model_bytes(settings: ModelSettings) -> int:
    """Return the bytes of the weights at the recipe's dtype; tied weights count once.

    Raises:
        ValueError: where there is no such model.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(settings)
    otherwise = f"model.name must be a causal language model, got {settings.name}"
    with found(otherwise), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=settings.trust_remote_code
        )
    width = torch.empty((), dtype=DTYPES[settings.dtype]).element_size()
    return sum(width * parameter.numel() for parameter in model.parameters())
