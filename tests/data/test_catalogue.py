"""Data sets known by name, read from small samples written by hand in the form that the Hub or their authors give them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.catalogue import CATALOGUE, completed
from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, federate
from fedloom.data.partition import Natural
from fedloom.data.tokens import IGNORED
from fedloom.models.build import ModelSettings, load_tokenizer
from fedloom.objectives import OBJECTIVES
from fedloom.recipe import RecipeError, apply_overrides, build_recipe, read_tree
from fedloom.rounds.recipe_settings import Recipe

POST = {
    "post": "My cat sits.",
    "title": "Cats",
    "subreddit": "pets",
    "article": None,
    "id": "1",
    "site": None,
}
TOLD = {"instruction": "Say hello.", "response": "hello"}
SAMPLES: dict[str, list[dict[str, Any]] | dict[str, list[dict[str, Any]]]] = {
    "alpaca": [
        {"instruction": f"Say {i}.", "input": x, "output": f"it is {i}", "text": f"Below ... {i}"}
        for i, x in enumerate(["", "in French", "  ", ""])
    ],
    "alpaca_cleaned": [
        {"instruction": f"Say {i}.", "input": None, "output": f"it is {i}"} for i in range(4)
    ],
    "alpaca_gpt4": [{"instruction": f"Say {i}.", "output": f"it is {i}"} for i in range(4)],
    "dolly": [
        {
            "instruction": f"Say {i}.",
            "context": "" if i % 2 else "so",
            "response": f"it is {i}",
            "category": c,
        }
        for i, c in enumerate(["open_qa", "closed_qa"] * 3)
    ],
    "codealpaca": [
        {"instruction": f"Write {i}.", "input": "", "output": f"print({i})"} for i in range(4)
    ],
    "codealpaca_languages": [
        {"instruction": f"Write {i}.", "input": lang, "output": f"print({i})"}
        for i, lang in enumerate(["Python", "Java"] * 3)
    ],
    "code_search_net": [
        {
            "repository_name": "a/b",
            "func_documentation_string": f"Return {i}.",
            "func_code_string": f"def f(): return {i}",
            "language": lang,
            "split_name": "train",
        }
        for i, lang in enumerate(["python", "go"] * 3)
    ],
    "gsm8k": [
        {"question": f"What is {i} and 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"}
        for i in range(4)
    ],
    "natural_instructions": [
        {
            "task_name": t,
            "id": f"{t}-{i}",
            "definition": "Answer.",
            "inputs": f"is it {i}?",
            "targets": f"yes {i}",
        }
        for i, t in enumerate(["task001_a", "task002_b"] * 3)
    ],
    "aya": [
        {
            "inputs": f"¿{i}?",
            "targets": f"es {i}",
            "language": lang,
            "language_code": "x",
            "user_id": f"u{i}",
        }
        for i, lang in enumerate(["Spanish", "Zulu"] * 3)
    ],
    "fed_aya": {"7": [TOLD, {**TOLD, "response": "hi"}], "9": [{**TOLD, "response": "hey"}]},
    "fed_chatbot_it": {"7": [TOLD], "9": [{**TOLD, "response": "hey"}]},
    "fed_wildchat": {
        "7": [TOLD],
        "9": [
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hey"}]}
        ],
    },
    "fed_chatbot_pa": {
        who: [{"instruction": "Say hello.", "chosen": f"hello {who}", "rejected": "no"}]
        for who in "79"
    },
    "tldr": [
        {
            "info": POST,
            "summaries": [
                {"text": f"a cat {i}", "policy": "x"},
                {"text": f"a dog {i}", "policy": "y"},
            ],
            "choice": i % 2,
            "worker": w,
            "batch": "batch3",
        }
        for i, w in enumerate(["ann", "bob"] * 3)
    ],
    "shp": [
        {
            "post_id": str(i),
            "domain": f"ask{'baking' if i % 2 else 'vet'}_train",
            "history": f"How is {i}?",
            "human_ref_A": f"fine {i}",
            "human_ref_B": f"bad {i}",
            "labels": i % 2,
            "score_ratio": 2.0,
        }
        for i in range(6)
    ],
    "ultrafeedback": [
        {
            "prompt": f"Say {i}.",
            "prompt_id": str(i),
            **{
                side: [
                    {"role": "user", "content": f"Say {i}."},
                    {"role": "assistant", "content": f"{side} {i}"},
                ]
                for side in ("chosen", "rejected", "messages")
            },
            "score_chosen": 8.0,
            "score_rejected": 2.0,
        }
        for i in range(4)
    ],
    "hh_rlhf": [
        {side: f"\n\nHuman: Say {i}.\n\nAssistant: {side} {i}" for side in ("chosen", "rejected")}
        for i in range(4)
    ],
}
Written = Callable[..., str]


def recipe(name: str, path: str, *overrides: str) -> Recipe:
    clients = {} if CATALOGUE[name].label else {"num_clients": 2}
    data = {"source": name, "path": path, "fractions": [1, 0, 0], **clients}
    tree = {"name": "a", "algorithm": "fedavg", "data": data}
    return build_recipe(apply_overrides(tree, overrides))


def federation(of: Recipe) -> Federation:
    return federate(of.data, load_tokenizer(ModelSettings()), of.objective)


@pytest.fixture
def sample(written: Written) -> Callable[[str], str]:
    return lambda name: written(f"{name}.json", SAMPLES[name])


def test_every_data_set_has_a_sample():
    assert SAMPLES.keys() == CATALOGUE.keys()


@pytest.mark.parametrize("name", CATALOGUE)
def test_a_sample_is_learnt_whole_and_only_its_answers_are(name: str, sample: Callable[[str], str]):
    made = recipe(name, sample(name))
    found = federation(made)
    rows = SAMPLES[name]
    count = len(rows) if isinstance(rows, list) else sum(map(len, rows.values()))
    examples = [e for shard in found.shards.values() for e in shard.train]
    assert len(examples) == count
    assert found.manifest.num_dropped == 0
    said = " ".join(found.manifest.losses.lines())
    assert not set(CATALOGUE[name].reads) & set(said.replace(",", "").split())
    tokenizer = load_tokenizer(ModelSettings())
    for example in examples:
        prompt, answer = example.ids[: example.prompt_length], example.ids[example.prompt_length :]
        assert set(example.labels[: example.prompt_length].tolist()) == {IGNORED}
        assert example.labels[example.prompt_length :].tolist() == answer.tolist()
        text = tokenizer.decode(prompt)
        assert "None" not in text
        assert "nan" not in text.lower().split()
        record = example.record
        assert record is not None
        assert record.answer.split()[0] in tokenizer.decode(answer)
        if made.data.prompt == "alpaca":
            has_input = any(message.context for message in record.messages)
            assert ("### Input:" in text) == ("paired with an input" in text) == has_input


@pytest.mark.parametrize(
    ("name", "clients"),
    [
        ("dolly", {"closed_qa", "open_qa"}),
        ("codealpaca_languages", {"Java", "Python"}),
        ("code_search_net", {"go", "python"}),
        ("natural_instructions", {"task001_a", "task002_b"}),
        ("aya", {"Spanish", "Zulu"}),
        ("fed_aya", {"7", "9"}),
        ("tldr", {"ann", "bob"}),
        ("shp", {"askbaking", "askvet"}),
    ],
)
def test_a_data_set_with_a_label_has_a_client_for_each_value(
    name: str, clients: set[str], sample: Callable[[str], str]
):
    made = recipe(name, sample(name))
    assert isinstance(made.data.partition, Natural)
    assert federation(made).shards.keys() == clients


def test_what_a_recipe_says_itself_stands():
    data = {"source": "dolly", "partition": "iid", "num_clients": 3, "prompt": "plain"}
    assert completed({"data": data}) == {"data": data}
    assert completed({"data": {"source": "dolly", "num_clients": 3}}) == {
        "data": {"prompt": "alpaca", "source": "dolly", "num_clients": 3}
    }
    tree = {"objective": "orpo", "data": {"source": "hh_rlhf"}}
    assert completed(tree) == tree
    assert completed({"data": {"source": "a.json"}, "local": {}}) == {
        "data": {"source": "a.json"},
        "local": {},
    }


@pytest.mark.parametrize("name", [name for name, one in CATALOGUE.items() if one.pairs])
def test_pairs_are_learnt_by_dpo_and_the_better_answer_is_chosen(
    name: str, sample: Callable[[str], str]
):
    made = recipe(name, sample(name))
    assert type(made.objective) is OBJECTIVES["dpo"]
    for shard in federation(made).shards.values():
        for example in shard.train:
            assert example.record is not None
            chosen, rejected = example.record.answer, example.record.rejected
            better = {"tldr": chosen.startswith("a cat") == (int(chosen[-1]) % 2 == 0)}
            better["shp"] = chosen.startswith("fine") == (int(chosen[-1]) % 2 == 1)
            assert better.get(name, chosen.startswith(("chosen", "hello")))
            assert chosen != rejected


def test_a_name_takes_the_place_of_a_recipes_own_data_and_all_that_is_said_of_it():
    for before in ("quickstart", "dolly", "gsm8k"):
        tree = apply_overrides(read_tree(before), ["data.source=shp", "data.max_length=64"])
        assert tree["data"].keys() <= {"source", "max_length", "fractions", "truncate"}
        assert build_recipe(tree).data.partition == Natural("domain")
    kept = apply_overrides(read_tree("quickstart"), ["data.source=dolly", "data.num_clients=4"])
    assert kept["data"]["num_clients"] == 4


def test_own_splits_are_each_for_what_they_are_there_for(written: Written, tmp_path: Path):
    for split, numbers in (("train", range(8)), ("test", range(6, 10))):
        rows = [{"question": f"What is {i}?", "answer": f"It is so.\n#### {i}"} for i in numbers]
        written(f"gsm8k/{split}.json", rows)
    folder = str(tmp_path / "gsm8k")
    data = {"source": "gsm8k", "path": folder, "split": "all", "num_clients": 2}
    tree: dict[str, Any] = {"name": "a", "data": data}
    found = federation(build_recipe(tree))
    assert sum(len(shard.train) for shard in found.shards.values()) == 8
    assert sum(len(shard.test) for shard in found.shards.values()) == 4
    assert found.manifest.duplicates.leaks["test"].num_learnt == 2
    dropped = federation(build_recipe(apply_overrides(tree, ["data.duplicates=drop"])))
    assert sum(len(shard.train) for shard in dropped.shards.values()) == 6
    assert sum(len(shard.test) for shard in dropped.shards.values()) == 4
    leak = dropped.manifest.duplicates.leaks["test"]
    assert (leak.num_learnt, dropped.manifest.duplicates.num_shared) == (0, 0)
    assert dropped.manifest.duplicates.num_rows == 2
    one = federation(build_recipe({"name": "a", "data": {**data, "split": "test"}}))
    assert one.manifest.num_rows == 4
    with pytest.raises(ValueError, match="holds train, test, but no validation"):
        federation(build_recipe({"name": "a", "data": {**data, "split": "validation"}}))


def test_a_checkout_of_natural_instructions_and_files_of_tasks_are_read_by_name(
    written: Written, tmp_path: Path
):
    task = {
        "Definition": ["Answer."],
        "Instances": [{"id": "1", "input": "is it?", "output": ["yes", "aye"]}],
    }
    written("ni/tasks/task001_a.json", task)
    written("ni/splits/default/train_tasks.txt", "task001_a\n")
    written("ni/splits/default/test_tasks.txt", "")
    written(
        "flex/task9.json", [{"instruction": "Do.", "input": "x", "output": "y", "category": "z"}]
    )
    for path, client, answer in (("ni", "task001_a", "yes"), ("flex", "task9", "y")):
        found = federation(recipe("natural_instructions", str(tmp_path / path)))
        ((name, shard),) = found.shards.items()
        assert name == client
        assert shard.train[0].record is not None
        assert shard.train[0].record.answer == answer


def test_a_path_is_a_path_whatever_it_is_called(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    written("alpaca/a.json", [{"instruction": f"Do {i}.", "output": "y"} for i in range(4)])
    assert federation(recipe("alpaca", "alpaca")).manifest.num_rows == 4
    with pytest.raises(ValueError, match=r"data\.path squad does not exist"):
        federation(recipe("alpaca", "squad"))
    # A folder of one's own is a client a file, not splits.
    with pytest.raises(
        ValueError, match=r"data\.split all takes the own splits of a data set known"
    ):
        federation(build_recipe({"name": "a", "data": {"source": "./alpaca", "split": "all"}}))


def test_the_hub_is_asked_for_what_the_table_says(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked: list[tuple[Any, ...]] = []

    def load(path: str, name: str | None, *, split: str, revision: str | None) -> Any:
        asked.append((path, name, split, revision))
        raise OSError("no network")

    monkeypatch.setattr(datasets, "load_dataset", load)
    for given in ({}, {"split": "test"}, {"split": "train_sft"}):
        with pytest.raises(
            ValueError, match=r"ultrafeedback is HuggingFaceH4/.* no network; set data.path"
        ):
            federation(build_recipe({"name": "a", "data": {"source": "ultrafeedback", **given}}))
    with pytest.raises(ValueError, match=r"set data\.path to a file or folder"):
        federation(build_recipe({"name": "a", "data": {"source": "tldr"}}))
    assert [call[2] for call in asked[:3]] == ["train_prefs", "test_prefs", "train_sft"]
    assert asked[3][1:] == ("comparisons", "train", "refs/convert/parquet")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"source": "fed_aya"},
            "fed_aya is not on the Hub: set data.path to a file of it, as github",
        ),
        (
            {"source": "a.json", "path": "b.json"},
            "data.path has no effect beside data.source a.json",
        ),
        (
            {"source": "gsm8k", "split": "all", "fractions": [1, 0, 0]},
            "data.fractions has no effect where",
        ),
    ],
)
def test_a_setting_that_does_not_go_with_a_name_is_refused(data: dict[str, Any], said: str):
    with pytest.raises(RecipeError, match=said):
        build_recipe({"name": "a", "data": data})


def test_a_row_of_another_data_set_is_one_sentence(written: Written):
    path = written("a.json", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(
        ValueError,
        match=r"row 1: data.source dolly has the columns instruction, response or output, got prompt",
    ):
        federation(recipe("dolly", path))
    path = written(
        "b.json", [{"labels": 2, "history": "a", "human_ref_A": "a", "human_ref_B": "b"}]
    )
    with pytest.raises(ValueError, match=r"data\.source shp has the columns"):
        federation(recipe("shp", path))
    with pytest.raises(ValueError, match=r"data\.split all takes a folder that holds train"):
        federation(
            build_recipe({"name": "a", "data": {"source": "gsm8k", "path": path, "split": "all"}})
        )


def test_a_json_file_of_clients_and_their_rows_is_read(written: Written):
    path = written("a.json", {"ann": [TOLD], "bob": [TOLD, {**TOLD, "response": "hi"}]})
    found = federate(
        DataSettings(source=path, partition=Natural("client"), fractions=(1, 0, 0)),
        load_tokenizer(ModelSettings()),
    )
    assert {name: len(shard.train) for name, shard in found.shards.items()} == {"ann": 1, "bob": 2}
    assert found.manifest.duplicates.num_rows == 1
    assert found.manifest.duplicates.num_shared == 1
    path = written("b.json", {"ann": [{**TOLD, "client": "eve"}]})
    with pytest.raises(ValueError, match=r"rows of 'ann' have a column 'client' of their own"):
        federate(DataSettings(source=path), load_tokenizer(ModelSettings()))


def test_the_page_of_data_names_them_all():
    page = (Path(__file__).parents[2] / "docs" / "data_and_model.md").read_text(encoding="utf-8")
    for name, one in CATALOGUE.items():
        place = f"`{one.hub}`" if one.hub else one.elsewhere.partition(" ")[0]
        label = f"`{one.label}`" if one.label else "iid"
        kind = "dpo" if one.pairs else "sft"
        assert f"| `{name}` | {place} | {label} | `{kind}` |" in page, name
