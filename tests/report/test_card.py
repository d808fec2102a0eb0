import json
from collections.abc import Callable
from pathlib import Path

import yaml

from fedloom.report.card import Exported, model_card

Make = Callable[..., Path]


def test_a_card_says_what_the_adapter_is_and_how_to_load_it(fabricate: Make) -> None:
    folder = fabricate()
    (folder / "recipe.yaml").write_text("name: demo\nmodel: {name: org/model}\n")
    card = model_card(folder, adapter="global", clients=["client-000", "client-001", "client-002"])
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/model"
    assert front["library_name"] == "peft"
    for said in (
        "# demo: global",
        "An adapter of `org/model` fine-tuned with fedloom 0.1.0 by FedAvg over 3 clients",
        "(builtin:polyglot).\n4 rounds, 8.00 kB of traffic. It serves all 3 clients.",
        'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")',
        "| Test exact match | 0.0 % | 80.0 % |",
        "model: {name: org/model}",
    ):
        assert said in card


def test_a_built_in_base_is_loaded_through_the_package(fabricate: Make) -> None:
    card = model_card(fabricate(), adapter="client-001", clients=["client-001"])
    assert "base_model:" not in card
    assert 'load_base(ModelSettings(name="builtin:tiny"))' in card
    assert "It serves client-001." in card
    assert "Means over the held-out data of all clients together." in card


def test_the_card_says_in_which_prompt_the_model_was_trained(fabricate: Make) -> None:
    folder = fabricate()
    assert "Prompt of" not in model_card(folder, adapter="global", clients=["client-001"])
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["prompt"] = "plain: the tokenizer has no chat template"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    card = model_card(folder, adapter="global", clients=["client-001"])
    assert "Prompt of its training data: plain: the tokenizer has no chat template." in card


def test_a_gguf_base_is_loaded_from_its_file(fabricate: Make) -> None:
    folder = fabricate()
    for name, where in {
        "~/models/tiny.gguf": 'Path("~/models").expanduser()',
        "tiny.gguf": 'Path(".").expanduser()',
        "./models": 'Path("./models").expanduser()',
        "org/tiny": '"org/tiny"',
    }.items():
        (folder / "recipe.yaml").write_text(f"name: demo\nmodel: {{name: {name}}}\n")
        card = model_card(folder, adapter="global", clients=["a"], gguf="tiny.gguf")
        assert f"base = {where}\n" in card
        assert ("from pathlib import Path" in card) == where.startswith("Path")
        assert 'from_pretrained(base, gguf_file=file, dtype="float32")' in card
        assert f"of `{name if name.endswith('.gguf') else name + '/tiny.gguf'}` fine-tuned" in card
        assert ("base_model:" in card) == (not name.endswith(".gguf"))


def test_a_merged_model_is_loaded_by_transformers_alone(fabricate: Make) -> None:
    folder = fabricate(clients=20)
    names = [f"client-{at:03d}" for at in range(12)]
    card = model_card(folder, adapter="cluster-0", clients=names, exported=Exported("merged"))
    assert "library_name: transformers" in card
    assert "AutoModelForCausalLM.from_pretrained(folder)" in card
    assert "It serves 12 of 20 clients." in card


def test_a_run_of_which_little_is_known_has_a_card_too(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    card = model_card(tmp_path, adapter="global", clients=["a"])
    assert "An adapter fine-tuned with fedloom over 1 clients" in card
    assert "## Results" not in card
