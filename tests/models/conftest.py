"""A model that fits the tokenizer of the tests' GGUF files, and such files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models.gguf_files import TOKENS, Q, write_gguf


@pytest.fixture(scope="session")
def gguf_llama(tiny_llama: Callable[..., Any]) -> Any:
    return tiny_llama(vocab=len(TOKENS))


@pytest.fixture(scope="session")
def tiny_gguf(gguf_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a GGUF file in 8 bits, alone in its folder."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", gguf_llama, Q.Q8_0)
