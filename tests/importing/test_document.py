"""A configuration of another framework becomes a recipe, and no key of it is lost."""

import json
from pathlib import Path

import pytest
from tests.importing.conftest import FEDKSEED, FEDMLLM, FEDSCOPE, FLOWERTUNE, OPENFEDLLM

from fedloom.importing.document import Imported, import_file, import_text
from fedloom.recipe import build_recipe, load_recipe, read_tree
from fedloom.recipe_yaml import read_yaml


def made(text: str) -> Imported:
    return import_text(text, source="a file")


def test_a_file_is_known_by_what_is_in_it_and_its_text_is_the_recipe(written: tuple[str, str]):
    framework, text = written
    imported = made(text)
    assert imported.framework.name == framework
    assert build_recipe(read_yaml(imported.text())) == build_recipe(
        {"name": imported.name, **imported.tree}
    )


def test_every_key_is_in_the_comments_with_what_became_of_it(written: tuple[str, str]):
    imported = made(written[1])
    head = " ".join(line.lstrip("# ") for line in imported.text().split("\n\n")[0].splitlines())
    given = [line for line in imported.lines if line.given]
    assert len(given) == len({line.key for line in given}) > 8
    for line in given:
        assert line.settings or line.remark
        assert line.key in head or line.key == "(script)"
    assert "-> local.lr" in head
    assert "Without counterpart" in head


def test_federatedscope_becomes_what_it_means():
    recipe = build_recipe({"name": "a", **made(FEDSCOPE).tree})
    data, local = recipe.data, recipe.local
    assert (data.source, data.num_clients, data.max_length) == ("my_rows/mine.json", 5, 320)
    assert data.prompt == "alpaca"
    assert made(FEDSCOPE).tree["data"]["partition"] == {
        "dirichlet": {"by": "category", "alpha": 0.3, "min_examples": 1}
    }
    assert (local.optimizer, local.lr, local.steps, local.batch_size) == ("sgd", 0.002, 7, 2)
    assert local.max_grad_norm is None
    assert made(FEDSCOPE).tree["tune"] == {
        "lora": {"rank": 4, "alpha": 12.0, "dropout": 0.1, "targets": ["q_proj", "v_proj"]}
    }
    assert made(FEDSCOPE).tree["cohort"] == {"uniform": {"size": 2}}
    assert (recipe.run.rounds, recipe.run.patience, recipe.run.monitor) == (
        40,
        4,
        "validation/loss",
    )
    assert (recipe.evaluation.every, recipe.evaluation.generate) == (8, False)
    assert recipe.model.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("old", "new", "path", "value"),
    [
        ("type: 'mine.json@llm'", "type: 'dolly-15k@llm'", "data.source", "dolly"),
        ("splitter: 'lda'", "splitter: 'meta'", "data.partition", {"natural": {"by": "category"}}),
        ("splitter: 'lda'", "splitter: iid", "data.partition", "iid"),
        ("mode: standalone", "mode: standalone\n  method: local", "algorithm", "local"),
        (
            "early_stop:",
            "fedprox: {use: True, mu: 0.2}\nearly_stop:",
            "algorithm",
            {"fedavg": {"mu": 0.2}},
        ),
        (
            "early_stop:",
            "fedopt: {use: True, optimizer: {type: Adam, lr: 0.05}}\nearly_stop:",
            "algorithm",
            {"fedavg": {"server": {"adamw": {"lr": 0.05, "weight_decay": 0.0}}}},
        ),
        (
            "mode: standalone",
            "mode: standalone\n  method: Ditto",
            "algorithm",
            [{"ditto": {"strength": 0.1}}, "fedavg"],
        ),
        ("type: llmtrainer", "type: mezotrainer", "local.order", "zeroth"),
        ("client_num: 5", "client_num: 5\n  unseen_clients_rate: 0.4", "data.unseen", 0.4),
        (
            "early_stop:",
            "finetune: {before_eval: True, batch_or_epoch: batch, local_update_steps: 6}\nearly_stop:",
            "evaluation.finetune.steps",
            6,
        ),
        ("batch_or_epoch: batch", "batch_or_epoch: epoch", "local.epochs", 7),
        ("    use: True\n    args", "    use: False\n    args", "tune", "full"),
        ("'lora', 'r': 4", "'prefix', 'num_virtual_tokens': 9", "tune.prefix.tokens", 9),
        ("early_stop:", "quantization: {method: uniform}\nearly_stop:", "wire.upload", "int8"),
        (
            "  adapter:\n    use: True",
            "  offsite_tuning: {use: True, emu_l: 2, emu_r: 30, kwargs: [{drop_ratio: 0.2}]}\n"
            "  adapter:\n    use: False",
            "tune.offsite.drop",
            0.2,
        ),
    ],
)
def test_a_choice_of_federatedscope_has_its_setting(old: str, new: str, path: str, value: object):
    assert old in FEDSCOPE
    found: object = made(FEDSCOPE.replace(old, new)).tree
    for key in path.split("."):
        assert isinstance(found, dict)
        found = found[key]
    assert found == value


def test_what_does_not_go_together_here_is_left_out_with_the_reason():
    imported = made(FEDSCOPE.replace("llmtrainer", "mezotrainer"))
    assert imported.tree["tune"]["lora"]["dropout"] == 0.0
    assert "without dropout, of which zeroth order has none" in " ".join(imported.text().split())
    robust = f"{FEDSCOPE}aggregator: {{robust_rule: median}}\n"
    imported = made(robust.replace("rate: 0.4", "rate: 0.8"))
    assert imported.tree["algorithm"] == {"fedavg": {"combine": {"median": {}}}}
    assert imported.tree["tune"]["lora"]["origin"] == "zero"
    dora = FLOWERTUNE.replace(
        "train.seq-length", "model.lora.peft-use-dora = true\ntrain.seq-length"
    )
    imported = made(dora)
    assert "dora" not in imported.tree["tune"]["lora"]
    (line,) = (line for line in imported.lines if line.key.endswith("use-dora"))
    assert not line.settings
    assert "whole weights" in line.remark


def test_a_switch_that_is_off_leaves_what_it_switches_without_effect():
    text = FEDSCOPE + "fedprox: {use: False, mu: 0.3}\nmystery: {depth: 2}\n"
    lines = {line.key: line for line in made(text).lines}
    assert lines["fedprox.mu"].remark == "no effect without fedprox.use"
    assert not lines["fedprox.mu"].settings
    assert "no such key" in lines["mystery.depth"].remark
    assert made(text).tree["algorithm"] == "fedavg"


def test_a_script_is_read_as_a_shell_expands_it():
    tree = made(OPENFEDLLM).tree
    assert (tree["run"]["rounds"], tree["local"]["steps"], tree["local"]["lr"]) == (30, 6, 3e-5)
    assert tree["local"]["min_lr"] == 1e-6
    assert tree["data"]["prompt"] == "vicuna"
    assert tree["data"]["num_clients"] == 12
    assert tree["cohort"] == {"uniform": {"size": 3}}
    yogi = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "tau": 1e-3, "variant": "openfedllm"}
    assert tree["algorithm"] == {"fedavg": {"server": {"yogi": yogi}, "weighting": "uniform"}}


@pytest.mark.parametrize(
    ("before", "behind"),
    [
        ("cd code && ", " > train.log 2>&1 &"),
        ("export CUDA_VISIBLE_DEVICES=0; ", " 2>&1 | tee train.log"),
        ("", " >> train.log && echo done"),
    ],
)
def test_what_stands_around_a_call_is_no_option_of_it(before: str, behind: str):
    lines = OPENFEDLLM.rstrip().removesuffix("\\").splitlines()
    at = next(at for at, line in enumerate(lines) if "python" in line)
    lines[at] = before + lines[at].lstrip()
    assert made("\n".join(lines) + behind + "\n").tree == made(OPENFEDLLM).tree


def test_the_other_scripts_have_their_own_meaning():
    tree = made(FEDMLLM).tree
    mode = {"paper": {"num_clusters": 3, "at_round": 2}}
    assert tree["algorithm"] == [{"clustered": {"mode": mode}}, "fedavg"]
    assert tree["data"]["partition"]["multi_domain"]["order"][0] == "English"
    assert tree["data"]["fractions"] == [0.75, 0.0, 0.25]
    assert tree["evaluation"]["every"] == 6
    tree = made(FEDKSEED).tree
    pro = {"fedkseed": {"steps": 200, "sampling": {"pro": {"clip": 1000.0}}}}
    assert tree["algorithm"] == pro
    assert tree["tune"]["seeds"] == {"distribution": "gaussian", "num_seeds": 512}
    assert tree["data"]["held_out"] == {"category": ["summarization"]}
    assert tree["cohort"] == {"uniform": {"size": 4}}
    dpo = OPENFEDLLM.replace("main_sft", "main_dpo").replace(
        "tatsu-lab/alpaca", "Anthropic/hh-rlhf"
    )
    assert made(dpo).tree["objective"] == {"dpo": {"beta": 0.1}}
    assert made(dpo).tree["local"]["min_lr"] == 1e-5
    private = OPENFEDLLM.replace("fedyogi", "feddp --checkpoint_step 5 --dp_epsilon 2")
    assert made(private).tree["algorithm"][0]["private"]["epsilon"] == 2.0
    assert made(private).tree["cohort"] == {"poisson": {"q": 0.25}}
    alone = OPENFEDLLM.replace("fedyogi", "local0 --checkpoint_step 5 --local_data_dir a/one.json")
    data = made(alone.replace("tatsu-lab/alpaca", "FedChatbotPA_local")).tree["data"]
    assert (data["source"], data["path"], data["partition"]) == (
        "fed_chatbot_pa",
        "a/one.json",
        "iid",
    )


def test_an_app_of_flower_has_its_tables():
    imported = made(FLOWERTUNE)
    tree = imported.tree
    assert imported.name == "my-app"
    assert tree["model"]["quantize"] == "int8"
    assert tree["tune"]["lora"]["rank"] == 6
    assert tree["data"]["source"] == "some-lab/some-instructions"
    assert (tree["data"]["num_clients"], tree["cohort"]) == (16, {"uniform": {"size": 4}})
    assert (tree["local"]["lr"], tree["local"]["min_lr"]) == (4e-5, 2e-6)
    assert tree["evaluation"] == {"every": 0}
    lost = {line.key: line.remark for line in imported.lines if not line.settings}
    assert "Hugging Face's trainer" in lost["train.training-arguments.tf32"]
    assert "of the app's own" in lost["train.my-own-switch"]
    assert lost["train.training-arguments.num-train-epochs"] == "max-steps overrides it"
    assert lost["package"].startswith("tables of the package")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nothing of the kind", "it must be a FlowerTune pyproject.toml"),
        ("echo python\n", "it must be a FlowerTune"),
        ("algorithm: fedavg\ndata: {source: a.json}\n", "it is a recipe of fedloom"),
        ("a: 1\n", "it is YAML, but must be"),
        (f"{FEDSCOPE}data:\n  type: again\n", "it is not YAML: line"),
        (FEDSCOPE.replace("mine.json", "femnist"), "data.type of FederatedScope-LLM cannot be"),
        (FEDSCOPE.replace("lr: 0.002", "lr: fast"), "train.optimizer.lr .* cannot be 'fast'"),
        (
            FEDSCOPE.replace("standalone", "standalone\n  method: gcfl"),
            "no algorithm stands for it",
        ),
        (FLOWERTUNE.replace("= 0.25", "= $share"), "but is not TOML"),
        (FLOWERTUNE.replace("tool.flwr.app.config", "tool.flwr.app.other"), "no table"),
        (OPENFEDLLM.replace("lr=3e-5", ""), "the variable lr is used and not set"),
        (OPENFEDLLM.replace("lr=3e-5", "lr=$(cat lr)"), "the variable lr is used and not set"),
        (OPENFEDLLM.replace("lr=3e-5", "lr=${1:-3e-5}"), "the variable lr is used and not set"),
        (
            OPENFEDLLM.replace("$dataset_name", "${SET:-tatsu-lab/alpaca}"),
            r"'\$\{SET:-tatsu-lab/alpaca\}' is what only a shell can work out",
        ),
        (OPENFEDLLM.replace(" 900", " 900 1000"), "'1000' belongs to no option"),
        (OPENFEDLLM.replace('"vicuna"', '"vicuna'), "no closing quotation"),
        (f"{FEDKSEED}\n{FEDKSEED}\n", "it holds 2 calls of a Python script"),
        ("python train.py --epochs 3", "its script train.py takes other options"),
        (OPENFEDLLM.replace("fedyogi", "fedsomething"), "fed_alg of OpenFedLLM cannot be"),
        (
            OPENFEDLLM.replace("--num_clients 12", "--num_clients 0"),
            "that cannot be run: .*at least 1",
        ),
    ],
)
def test_what_cannot_be_imported_is_one_sentence(text: str, said: str):
    with pytest.raises(ValueError, match=said) as refused:
        made(text)
    assert "\n" not in str(refused.value)


def test_a_comment_holds_whatever_a_value_holds():
    text = FEDSCOPE.replace("some.ckpt", "a\\nrun: {rounds: 1}\\n# b")
    tree = read_yaml(made(text).text())
    assert tree["run"]["rounds"] == 40


def test_a_file_that_is_absent_or_no_text_is_one_sentence(tmp_path: Path):
    with pytest.raises(ValueError, match="does not exist, or is a folder"):
        import_file(tmp_path)
    long = tmp_path / f"{'a' * 120}.yaml"
    long.write_text(FEDSCOPE)
    assert import_file(long).name == "a" * 100
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        import_file(tmp_path / "a.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("text", [FEDSCOPE, OPENFEDLLM], ids=["fedscope", "openfedllm"])
def test_plan_takes_an_imported_recipe_where_its_data_can_be_had(text: str, tmp_path: Path):
    from fedloom.results.plan import make_plan

    languages = ["English", "Dutch", "Turkish", "Portuguese", "Spanish"]
    rows = [
        {
            "instruction": f"say {i}",
            "output": f"{i}",
            "category": f"c{i % 3}",
            "language": languages[i % 5],
        }
        for i in range(200)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "made.yaml").write_text(made(text).text())
    changes = [
        f"data.source={tmp_path / 'rows.json'}",
        "data.columns={}",
        "model.name=builtin:tiny",
    ]
    recipe = load_recipe(
        tmp_path / "made.yaml", [*changes, "data.max_length=96", "local.batch_size=1"]
    )
    assert "bytes" in str(make_plan(recipe).table().columns[0]._cells)


def test_the_command_prints_or_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from fedloom import cli_recipes

    (tmp_path / "in.yaml").write_text(FEDSCOPE)
    out = tmp_path / "out.yaml"
    cli_recipes.recipes_import(str(tmp_path / "in.yaml"), out)
    assert read_tree(out)["run"]["rounds"] == 40
    capsys.readouterr()
    cli_recipes.recipes_import(str(tmp_path / "in.yaml"), None)
    assert capsys.readouterr().out == out.read_text()
    with pytest.raises(ValueError, match="exists already"):
        cli_recipes.recipes_import(str(tmp_path / "in.yaml"), out)
