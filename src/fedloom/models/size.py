"""How large a model is, told from its configuration, before any weight is read."""

import torch

from fedloom.models.build import DTYPES, ModelSettings, locate
from fedloom.models.quiet import quiet


def model_bytes(settings: ModelSettings) -> int:
    """Return the bytes of the weights at the recipe's dtype; tied weights count once.

    Raises:
        ValueError: where there is no such model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet():
        try:
            config = AutoConfig.from_pretrained(
                locate(settings.name),
                revision=settings.revision,
                trust_remote_code=settings.trust_remote_code,
            )
        except (OSError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(
                f"model.name {settings.name} has no readable configuration: {reason}"
            ) from error
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, trust_remote_code=settings.trust_remote_code
            )
    width = torch.empty((), dtype=DTYPES[settings.dtype]).element_size()
    return sum(width * parameter.numel() for parameter in model.parameters())
