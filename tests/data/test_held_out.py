"""What is judged on and never learnt: the clients that hold it, and the splits FedKSeed's paper takes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings, Sample
from fedloom.data.encoding import lengths
from fedloom.data.federation import Federation, federate
from fedloom.data.formats import to_records
from fedloom.data.partition import Dirichlet, Natural
from fedloom.data.sources import take_rows
from fedloom.recipe import load_recipe

DOLLY = {
    "brainstorming": 1766,
    "classification": 2136,
    "closed_qa": 1773,
    "creative_writing": 709,
    "general_qa": 2191,
    "information_extraction": 1506,
    "open_qa": 3742,
    "summarization": 1188,
}
"""Rows of every category."""


def labels(examples: Any, label: str) -> Counter[str]:
    return Counter(example.record.labels[label] for example in examples)


@pytest.fixture
def base(written: Callable[..., str]) -> DataSettings:
    rows = [
        {"prompt": f"{i}?", "completion": f"{i}", "task": f"t{i % 4}", "language": f"l{i % 3}"}
        for i in range(240)
    ]
    return DataSettings(
        source=written("rows.jsonl", rows), prompt="plain", num_clients=4, max_length=64
    )


def assert_never_learnt(federation: Federation, label: str, value: str) -> None:
    for shard in federation.shards.values():
        for example in shard.train:
            assert example.record is not None
            assert not example.record.held_out
            assert example.record.labels[label] != value


def test_one_more_client_judges_on_what_nobody_learns(base: DataSettings, byte_level: Any):
    federation = federate(replace(base, held_out={"task": ["t1"]}), byte_level)
    assert list(federation.shards) == [f"client-00{i}" for i in range(4)] + ["held-out"]
    assert_never_learnt(federation, "task", "t1")
    judge = federation.shards["held-out"]
    assert (len(judge.train), len(judge.validation)) == (0, 0)
    assert labels(judge.test, "task") == {"t1": 60}
    assert federation.profiles["held-out"] == {"task": "t1"}
    counts = federation.manifest.clients["held-out"]
    assert (counts.train, counts.test, counts.labels["task"]) == (0, 60, {"t1": 60})
    assert federation.manifest.num_unassigned == 0


def test_a_row_is_held_out_for_any_of_its_labels(base: DataSettings, byte_level: Any):
    federation = federate(replace(base, held_out={"task": ["t1"], "language": ["l0"]}), byte_level)
    assert_never_learnt(federation, "task", "t1")
    assert_never_learnt(federation, "language", "l0")
    assert len(federation.shards["held-out"].test) == 60 + 60


def test_natural_clients_have_judges_of_their_own(base: DataSettings, byte_level: Any):
    settings = replace(
        base,
        partition=Natural("language", largest=2),
        num_clients=None,
        held_out={"task": ["t1", "t2"]},
    )
    federation = federate(settings, byte_level)
    assert list(federation.shards) == ["held-out-l0", "held-out-l1", "held-out-l2", "l0", "l1"]
    assert len(federation.shards["held-out-l2"].test) == 40
    assert federation.manifest.num_unassigned == 40, "of l2, which does not learn"


def test_who_learns_what_does_not_depend_on_tiers_of_the_judge(base: DataSettings, byte_level: Any):
    federation = federate(
        replace(base, held_out={"task": ["t1"]}, tiers={"phone": 0.5, "desk": 0.5}), byte_level
    )
    tiers = {client: profile["tier"] for client, profile in federation.profiles.items()}
    assert tiers.pop("held-out") in {"phone", "desk"}
    assert Counter(tiers.values()) == {"phone": 2, "desk": 2}


def test_the_pool_never_learns_it_either(base: DataSettings, byte_level: Any):
    federation = federate(replace(base, held_out={"task": ["t1"]}, pooled=True), byte_level)
    assert_never_learnt(federation, "task", "t1")
    assert len(federation.shards["pool"].train) == 144
    assert len(federation.shards["held-out"].test) == 60


def test_a_judge_whose_answers_are_all_cut_off_is_refused(
    written: Callable[..., str], byte_level: Any
):
    rows = [{"prompt": f"{i}?", "completion": "a", "task": "t0"} for i in range(20)]
    rows += [{"prompt": "long " * 40, "completion": "a", "task": "t1"}]
    settings = DataSettings(
        source=written("rows.jsonl", rows),
        prompt="plain",
        num_clients=2,
        max_length=32,
        held_out={"task": ["t1"]},
    )
    with pytest.raises(
        ValueError, match=r"data\.held_out has no example left: data\.max_length 32"
    ):
        federate(settings, byte_level)


def test_a_client_called_like_the_judge_is_refused(base: DataSettings, byte_level: Any):
    rows = Path(base.source).read_text().replace('"l0"', '"held-out-l1"')
    Path(base.source).write_text(rows)
    settings = replace(
        base, partition=Natural("language"), num_clients=None, held_out={"task": ["t1"]}
    )
    with pytest.raises(ValueError, match=r"data\.held_out adds a client held-out-l1, but one"):
        federate(settings, byte_level)


# --- the splits of FedKSeed's paper ---------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.5, 5.0])
def test_dolly_is_split_as_in_the_paper(alpha: float, written: Callable[..., str]):
    """One category judged, seven learnt, 200 clients of at least 10."""
    rows = [
        {"instruction": f"{i}", "context": "", "response": "a", "category": category}
        for category, count in DOLLY.items()
        for i in range(count)
    ]
    path = written("dolly.jsonl", rows)
    overrides = [f"data.source={path}", f"data.partition.dirichlet.alpha={alpha}"]
    data = load_recipe("dolly", overrides).data
    records = to_records(take_rows(data).rows, data).records
    judged = Counter(record.labels["category"] for record in records if record.held_out)
    assert judged == {"summarization": DOLLY["summarization"]}
    learnt = [record.labels for record in records if not record.held_out]
    assert len({of_record["category"] for of_record in learnt}) == 7
    clients = data.partition.assign(learnt, data.num_clients, 0).values()
    assert len(clients) == 200
    assert min(map(len, clients)) >= 10
    assert sum(map(len, clients)) == sum(DOLLY.values()) - DOLLY["summarization"]
    kinds = [len({learnt[i]["category"] for i in indices}) for indices in clients]
    assert (sum(kinds) / 200 < 6) == (alpha == 0.5), "fewer categories a client where alpha is low"


def test_a_balanced_draw_gives_no_more_to_who_has_enough(byte_level: Any):
    names = [{"category": category} for category, count in DOLLY.items() for _ in range(count)]
    equal = len(names) / 50
    plain = Dirichlet("category", alpha=0.5).assign(names, 50, 3)
    balanced = Dirichlet("category", alpha=0.5, balanced=True).assign(names, 50, 3)
    most = [max(map(len, clients.values())) for clients in (plain, balanced)]
    assert most[1] < most[0]
    last = names[-1]["category"]
    for indices in balanced.values():
        before = [i for i in indices if names[i]["category"] != last]
        assert len(before) < equal or len(before) == len(indices)


def task(count: int, long: int, number: int) -> dict[str, Any]:
    """Return a task file: `count` short instances and `long` ones of 1,024 characters."""
    inputs = [f"in {i}" for i in range(count)] + ["x" * 1023, *["x" * 1024] * long]
    return {
        "Definition": [f"Do {number}.", "unused"],
        "Categories": ["Some"],
        "Input_language": ["English"],
        "Instances": [
            {"id": f"{i}", "input": t, "output": ["a", "b"]} for i, t in enumerate(inputs)
        ],
    }


@pytest.fixture
def checkout(written: Callable[..., str], tmp_path: Path) -> Callable[..., str]:
    """Return a writer of folders in the form of Natural Instructions: tasks of each split, by name."""

    def write(**splits: dict[str, dict[str, Any]]) -> str:
        for split, tasks in splits.items():
            written(f"splits/default/{split}_tasks.txt", "\n".join(tasks) + "\n")
            for name, content in tasks.items():
                written(f"tasks/{name}.json", content)
        written("tasks/task9999_listed_nowhere.json", task(30, 0, 9999))
        return str(tmp_path)

    return write


def test_natural_instructions_is_chosen_as_in_the_paper(checkout: Callable[..., str]):
    """738 of 757 tasks are learnt and 119 judged, with the paper's filters."""
    # 19 tasks keep 19 instances of 40.
    train = {f"task{n:04d}": task(*((18, 21) if n % 40 == 0 else (24, 1)), n) for n in range(757)}
    sizes = {757: 1549, 758: 9}
    test = {f"task{n:04d}": task(sizes.get(n, 24), 1, n) for n in range(757, 876)}
    source = checkout(train=train, test=test)
    data = load_recipe("natural_instructions", [f"data.source={source}"]).data
    rows = take_rows(data).rows
    learnt = Counter(str(row.values["task"]) for row in rows if not row.held_out)
    judged = Counter(str(row.values["task"]) for row in rows if row.held_out)
    assert (len(learnt), len(judged)) == (738, 119)
    assert not learnt.keys() & judged.keys()
    assert set(learnt.values()) == {5}, "a fifth of 25"
    counts = [judged[name] for name in test]
    assert counts == [31, 10, *[20] * 117], "2 % of 1,550; all of 10; 20 of 25"
    assert {row.values["split"] for row in rows if row.held_out} == {"test"}


def test_a_task_is_a_client_and_its_input_stands_apart(
    checkout: Callable[..., str], byte_level: Any
):
    source = checkout(
        train={f"task{n}_learn": task(24, 1, n) for n in range(2)}, test={"task2": task(24, 1, 2)}
    )
    data = load_recipe("natural_instructions", [f"data.source={source}"]).data
    federation = federate(data, byte_level)
    assert list(federation.shards) == ["held-out-task2", "task0_learn", "task1_learn"]
    assert [len(shard.test) for shard in federation.shards.values()] == [20, 0, 0]
    example = federation.shards["task1_learn"].train[0]
    assert example.record is not None
    assert example.record.answer == "a"
    assert example.record.messages[0].content.startswith("Do 1.\n\n")
    said = byte_level.decode(example.ids.tolist())
    assert "### Instruction:\nDo 1.\n\n### Input:\n" in said


def test_inputs_can_be_measured_in_tokens(checkout: Callable[..., str], byte_level: Any):
    """The filter in tokens is an option of its own."""
    source = f"data.source={checkout(train={'t0': task(18, 5, 0)}, test={'t1': task(24, 0, 1)})}"
    data = load_recipe("natural_instructions", [source, "data.sample.skip_below=0"]).data
    length = lengths(["x" * 1023], byte_level)[0]
    for limit, count in ((length + 9, 24), (length, 18)):
        given = replace(
            data, shorter={"input": limit}, shorter_in="tokens", sample=Sample(skip_below=count)
        )
        assert len(federate(given, byte_level).shards["t0"].train) == count


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("splits/default/test_tasks.txt", "holds task files, but no .*test_tasks.txt"),
        ("tasks/task0003_learn.json", "train_tasks.txt names task0003_learn, but there is no "),
    ],
)
def test_an_incomplete_checkout_is_named(
    gone: str, message: str, written: Callable[..., str], tmp_path: Path
):
    written("tasks/task0003_learn.json", task(3, 0, 3))
    written("splits/default/train_tasks.txt", "task0003_learn\n")
    written("splits/default/test_tasks.txt", "")
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=message):
        federate(DataSettings(source=str(tmp_path)), None)  # type: ignore[arg-type]  # refused before
