"""What every test shares: one thread, no network, caches of its own, and a tiny random model.

The model fixtures are factories, so that a test asks for the size, type or seed it needs. Nothing is downloaded.
"""

import atexit
import gc
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

# What is imported and collected stays until the end: looking through it for garbage took a quarter of that time.
gc.disable()
# Before anything imports torch or huggingface_hub, which read these once.
CACHE = Path(tempfile.mkdtemp(prefix="fedloom-tests-"))
atexit.register(shutil.rmtree, CACHE, ignore_errors=True)
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "agg",
    "MPLCONFIGDIR": str(CACHE / "matplotlib"),
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HOME": str(CACHE / "hf"),
    "FEDLOOM_CACHE": str(CACHE / "fedloom"),
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}

import pytest
import torch
from hypothesis import settings

from fedloom.recipe import build_recipe
from fedloom.rounds.recipe_settings import Recipe

torch.set_num_threads(1)
# The same examples every time, however busy the machine.
settings.register_profile("suite", deadline=None, derandomize=True, database=None)
settings.load_profile("suite")

LETTERS = "\n" + "".join(chr(code) for code in range(32, 127))
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}"
    "{% if message.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Look for garbage from here on, in what comes from here on."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves this machine."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"tests run without network, got a connection to {address[0]}")
        connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", local_only)
        yield


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Return a maker of random Llamas: `tiny_llama(seed=0, hidden=32, layers=2, vocab=64, dtype=torch.float32)`."""

    from fedloom.models.random_llama import random_llama

    return random_llama


@pytest.fixture(scope="session")
def tiny_routed(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """Return a maker of random Llamas whose MLPs are eight experts, of which a router sends each token to one."""
    from torch import nn
    from torch.nn import functional

    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            shares, chosen = super().forward(x).softmax(-1).max(-1)
            return shares, chosen

    class Routed(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.router = Router(width, 8, bias=False)
            self.experts = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(0, -2)
            shares, chosen = self.router(flat)
            out = torch.zeros_like(flat)
            for at, expert in enumerate(self.experts):
                mine = (chosen == at).nonzero().squeeze(1)
                if len(mine):
                    made = functional.silu(expert(flat[mine])) * shares[mine, None]
                    out = out.index_add(0, mine, made)
            return out.view_as(x)

    def make(*, dtype: torch.dtype = torch.float32, **sizes: Any) -> Any:
        model = tiny_llama(**sizes)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for layer in model.model.layers:
                layer.mlp = Routed(model.config.hidden_size)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """Return a tokenizer with one token a printable ASCII character (103 in all) and a chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<system>", "<user>", "<assistant>"]
    vocab = {token: at for at, token in enumerate([*special, *LETTERS])}
    characters = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens([AddedToken(token, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=characters,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
    )


@pytest.fixture(scope="session")
def tiny_folder(
    tiny_llama: Callable[..., Any], tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder with a random Llama and its tokenizer, as `model.name` takes it."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tiny_llama(vocab=len(tiny_tokenizer)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def real_text() -> Path:
    """Return the folder of real text, or skip."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("FEDLOOM_DATA", beside))
    if not folder.is_dir():
        pytest.skip("no real text beside the repository; FEDLOOM_DATA names its folder")
    return folder


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], Path]:
    """Return a function from the name of a real model's file to its path; a test that lacks it is skipped."""

    def find(name: str) -> Path:
        folder = os.environ.get("FEDLOOM_MODELS") or "~/.cache/fedloom/models"
        file = Path(folder).expanduser() / name
        if not file.is_file():
            pytest.skip(f"no {name} in $FEDLOOM_MODELS or ~/.cache/fedloom/models; `make models`")
        return file

    return find


def small_tree(model: Path, /, **sections: Any) -> dict[str, Any]:
    """Return a recipe of four clients and three rounds; `sections` are merged over it."""
    tree: dict[str, Any] = {
        "name": "small",
        "algorithm": "fedavg",
        "model": {"name": str(model)},
        "tune": {"lora": {"rank": 2, "targets": ["q_proj", "v_proj"]}},
        "data": {
            "num_examples": 80,
            "num_clients": 4,
            "where": {"language": ["en"]},
            "max_length": 192,
        },
        "local": {"optimizer": "sgd", "lr": 0.1, "steps": 2, "batch_size": 2},
        "evaluation": {"every": 2, "max_new_tokens": 3},
        "run": {"rounds": 3, "samples": 2},
    }
    for name, section in sections.items():
        known = tree.get(name)
        # What is tuned is lora, or says itself what.
        inner = name == "tune" and "lora" in section
        if inner:
            tree[name] = {"lora": {**tree["tune"]["lora"], **section["lora"]}}
        elif name != "tune" and isinstance(known, dict) and isinstance(section, dict):
            tree[name] = {**known, **section}
        else:
            tree[name] = section
    return tree


@pytest.fixture(scope="session")
def small_recipe(tiny_folder: Path) -> Callable[..., Recipe]:
    """Return a maker of small recipes."""

    def make(**sections: Any) -> Recipe:
        return build_recipe(small_tree(tiny_folder, **sections))

    return make


METHODS = """
import pathlib
from dataclasses import dataclass
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.ditto import Ditto
pathlib.Path(__file__).with_suffix(".ran").touch()

@dataclass(frozen=True)
class MyMethod(FedAvg):
    '''FedAvg under another name.'''
    strength: float = 1.0

@dataclass(frozen=True)
class MyWrapper(Ditto):
    pass

class Outer:
    @dataclass(frozen=True)
    class Inner(FedAvg):
        pass

@dataclass
class Loose:
    lr: float = 1.0

@dataclass(frozen=True)
class Unfinished:
    lr: float = 1.0
    def init(self, params, seed): ...

class Plain:
    pass

def function():
    pass
"""


def _forget_lab() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_lab"]:
        del sys.modules[name]


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the folder of a package, my_lab, whose modules leave a file beside them when they are imported."""
    _forget_lab()
    folder = tmp_path / "installed" / "my_lab"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "methods.py").write_text(METHODS)
    (folder / "broken.py").write_text("raise RuntimeError('no such card')")
    (folder / "hungry.py").write_text("import cupboard")
    (folder / "hidden.py").write_text(
        "from __future__ import annotations\nfrom my_lab.methods import MyMethod, dataclass, FedAvg\n"
        "@dataclass(frozen=True)\nclass Hidden(FedAvg):\n    on: Thing = None\n"
    )
    monkeypatch.syspath_prepend(str(folder.parent))
    yield folder
    _forget_lab()


@pytest.fixture
def answering(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Mapping[str, str]], None]:
    """Return what lets any model write, token by token, the text that is given for how a prompt ends."""

    def script(texts: Mapping[str, str]) -> None:
        def write(_model: Any, prompts: Any, *_: Any, over: Any = None, **__: Any) -> Any:
            shown = tiny_tokenizer.batch_decode(prompts, skip_special_tokens=True)
            said = [next(t for end, t in texts.items() if prompt.endswith(end)) for prompt in shown]
            whole = [tiny_tokenizer(text)["input_ids"] for text in said]
            ends = [
                next((n for n in range(1, len(ids)) if over and over(ids[:n])), len(ids))
                for ids in whole
            ]
            rows = [torch.tensor(ids[:end]) for ids, end in zip(whole, ends, strict=True)]
            ids = torch.nn.utils.rnn.pad_sequence(rows, True, tiny_tokenizer.pad_token_id)
            return ids, torch.full((len(ids),), 2**62)

        monkeypatch.setattr("fedloom.evaluation.generation.write_greedily", write)

    return script
