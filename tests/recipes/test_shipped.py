"""Every shipped recipe runs: one round of it, on a few examples, through the real entry point."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest

from fedloom import experiment
from fedloom.recipe import load_recipe, shipped
from fedloom.rounds.recipe_settings import Recipe

SMALL = (
    "run.rounds=1",
    "run.samples=1",
    "run.baselines=[]",
    "local.steps=1",
    "local.batch_size=2",
    "evaluation.max_examples=1",
    "evaluation.max_new_tokens=2",
)
NEWSGROUPS = load_recipe("newsgroups").objective.classes
AYA = [
    *("English", "Dutch", "Turkish", "Portuguese", "Spanish"),
    *("Filipino", "Bengali", "Standard Malay", "Lithuanian", "Tamil"),
    *("Zulu", "Irish", "Nepali", "Malayalam", "Telugu"),
]
"""FedMLLM's languages: much text, less, little."""
HUB: dict[str, Callable[[int, str | None], dict[str, Any]]] = {
    "openai/gsm8k": lambda i, config: {
        "question": f"Ann has {i} pens and buys 2. How many has she?",
        "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}",
    },
    "sahil2801/CodeAlpaca-20k": lambda i, config: {
        "instruction": f"Print {i}.",
        "input": "",
        "output": f"print({i})",
    },
    "databricks/databricks-dolly-15k": lambda i, config: {
        "instruction": f"Say {i}.",
        "context": f"It is {i}." if i % 2 else "",
        "response": f"{i}",
        "category": ["open_qa", "brainstorming", "summarization"][i % 3],
    },
    "CohereLabs/aya_dataset": lambda i, config: {
        "inputs": f"Say {i}.",
        "targets": f"{i}",
        "language": AYA[i % len(AYA)],
        "language_code": "xxx",
        "annotation_type": "original-annotations",
        "user_id": f"{i}",
    },
    "google/xquad": lambda i, config: {
        "id": f"{config}-{i}",
        "context": f"The tower of {config} is {i} metres high.",
        "question": "How high is it?",
        "answers": {"text": [f"{i} metres"], "answer_start": [0]},
    },
    "Anthropic/hh-rlhf": lambda i, config: {
        side: f"\n\nHuman: Say {i}.\n\nAssistant: {answer}"
        for side, answer in (("chosen", i), ("rejected", f"no, {i}"))
    },
    "HuggingFaceH4/ultrafeedback_binarized": lambda i, config: {
        "prompt": f"Say {i}.",
        "prompt_id": f"{i}",
        **{
            side: [
                {"role": "user", "content": f"Say {i}."},
                {"role": "assistant", "content": f"{answer}"},
            ]
            for side, answer in (("chosen", i), ("rejected", f"no, {i}"))
        },
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "SetFit/20_newsgroups": lambda i, config: {
        "text": f"Envelope {i}.",
        "label": i % 20,
        "label_text": list(NEWSGROUPS)[i % 20],
    },
}

ROWS = {"SetFit/20_newsgroups": 4000}
"""Where the recipe's clients are many."""
FITTING: dict[str, Sequence[str]] = {
    # Fewer clients for so few rows.
    "dolly": ("data.num_clients=3", "cohort.uniform.size=2", "data.partition.dirichlet.alpha=5"),
    "natural_instructions": ("cohort.uniform.size=2",),
    "aya": ("data.num_clients=5",),
    "aya_10": ("data.num_clients=10", "cohort.uniform.size=2"),
    "aya_15": ("data.num_clients=15", "cohort.uniform.size=2"),
    # Their steps are the algorithm's.
    **dict.fromkeys(
        ("fedkseed", "fedkseed_edge", "fedkseed_fast", "fedkseed_pro"),
        ("algorithm.fedkseed.steps=4", "local.steps=null"),
    ),
    "ferret": ("algorithm.fedkseed.steps=4",),
    **dict.fromkeys(("baffle", "decomfl"), ("algorithm.decomfl.steps=5", "local.steps=null")),
    **dict.fromkeys(("feedsign", "fedrep"), ("local.steps=null",)),
    # The round that groups clients is the third.
    "fedbiscuit": ("run.rounds=3",),
    # Their own models are run where they are: tests/models.
    **dict.fromkeys(("smollm2", "gemma_languages"), ("model.name=builtin:tiny",)),
}


@pytest.fixture
def task_files(tmp_path: Path) -> Path:
    """Write a checkout of Natural Instructions: three tasks to learn, one to judge on."""
    folder = tmp_path / "natural-instructions"
    for split, tasks in (("train", ("task1", "task2", "task3")), ("test", ("task4",))):
        (folder / "splits/default").mkdir(parents=True, exist_ok=True)
        (folder / f"splits/default/{split}_tasks.txt").write_text("\n".join(tasks))
        for task in tasks:
            instances = [{"input": f"{i}", "output": [f"{i + 1}"]} for i in range(24)]
            (folder / "tasks").mkdir(exist_ok=True)
            (folder / f"tasks/{task}.json").write_text(
                json.dumps({"Definition": ["Add one."], "Instances": instances})
            )
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, str, str | None]]:
    """Let load_dataset answer for the Hub, with rows of the columns its data sets have; return what was asked."""
    asked = []

    def load_dataset(path: str, name: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list([HUB[path](i, name) for i in range(ROWS.get(path, 48))])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


QUICK = {
    "quickstart",
    "flasc",
    "scaffold",
    "ditto",
    "fedkseed_fast",
    "ffa_lora",
    "natural_instructions",
}
"""Recipes that run among the fast tests; the others do among the slow."""


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in shipped()],
)
def test_a_shipped_recipe_runs_a_round(
    name: str, hub: list[Any], task_files: Path, tmp_path: Path
) -> None:
    recipe = load_recipe(name, [*SMALL, *FITTING.get(name, ())])
    builtin = recipe.data.source.startswith("builtin:")
    written = max(240, 12 * (recipe.data.num_clients or 0))
    rows = written if builtin else 8 * ROWS.get(recipe.data.source, 48)
    overrides = [*SMALL, f"data.num_examples={rows}", *FITTING.get(name, ())]
    local = recipe.data.source.startswith("./")
    if local:
        overrides.append(f"data.source={task_files}")
    summary = experiment.run(load_recipe(name, overrides), tmp_path).summary
    assert summary["rounds"] == recipe.run.rounds
    assert summary["num_absent"] == 0
    assert summary["final"]["test/loss"] > 0
    assert (tmp_path / "report.html").exists()
    named = recipe.data.config
    asked = len(named) if named and not isinstance(named, str) else 1
    assert len(hub) == (0 if builtin or local else asked)


def test_the_aya_recipes_hold_the_languages_of_fedmllm() -> None:
    for name, count in (("aya", 5), ("aya_10", 10), ("aya_15", 15)):
        assert list(load_recipe(name).data.where["language"]) == AYA[:count]


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "GPT2LMHeadModel", "Qwen2ForCausalLM"]
)
@pytest.mark.parametrize("space", ["lora", "full"])
def test_any_causal_language_model_takes_the_same_path(
    architecture: str, space: str, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    """A random model of another family, saved to a folder, instead of the bundled one."""
    import torch
    import transformers

    sizes: dict[str, dict[str, Any]] = {
        "GPT2LMHeadModel": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 256},
    }
    llama_like = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
    }
    kind = getattr(transformers, architecture)
    size = sizes.get(architecture, llama_like)
    config = kind.config_class(
        **size, vocab_size=len(tiny_tokenizer), pad_token_id=0, eos_token_id=2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kind(config).save_pretrained(tmp_path / "model")
    tiny_tokenizer.save_pretrained(tmp_path / "model")
    overrides = [
        *SMALL,
        f"model.name={tmp_path / 'model'}",
        f"tune={space}",
        "data.num_examples=160",
        "data.max_length=160",
        "run.rounds=3",
        "local.lr=0.01",
        "local.steps=3",
    ]
    recipe: Recipe = load_recipe("fedadam" if space == "lora" else "full", overrides)
    summary = experiment.run(recipe, tmp_path / "run").summary
    assert summary["final"]["test/loss"] < summary["before"]["test/loss"]
    written = tmp_path / "run/adapters/global"
    assert json.loads(
        (written / ("adapter_config.json" if space == "lora" else "config.json")).read_text()
    )
