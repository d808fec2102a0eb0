"""A whole model as a folder that transformers loads."""

from pathlib import Path

from fedloom.models.base_model import Base
from fedloom.models.generation import keep_file
from fedloom.models.hf_logging import quiet
from fedloom.models.int8 import Int8Linear


def write_model(base: Base, folder: Path) -> None:
    """Write the model as its tensors stand, and its tokenizer; quantised layers in the type of the others."""
    # Cloned, since tensors may be views of one vector, which safetensors takes for shared.
    state = {name: t.detach().cpu().clone() for name, t in base.model.state_dict().items()}
    for name, module in base.model.named_modules():
        if isinstance(module, Int8Linear):
            del state[f"{name}.scale"]
            state[f"{name}.weight"] = module.whole().to(base.model.dtype).cpu()
    with quiet():
        base.model.save_pretrained(folder, state_dict=state)
        keep_file(base.model, folder)
        base.tokenizer.save_pretrained(folder)
