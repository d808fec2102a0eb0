"""Rows that say which answer is preferred, or which is good."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedloom.data import polyglot
from fedloom.data.data_settings import DataSettings
from fedloom.data.federation import Federation, federate
from fedloom.data.formats import Record, to_records
from fedloom.data.preferences import to_judged, to_pairs
from fedloom.data.readers import Row
from fedloom.data.tokens import IGNORED, Example
from fedloom.models.build import ModelSettings, load_base
from fedloom.objectives.dpo import DPO
from fedloom.objectives.kto import KTO
from fedloom.objectives.objective import Objective

ASK = {"role": "user", "content": "q"}
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good", "bad"))
EARLIER = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
HUMAN = {"from": "human", "value": "q"}

PAIRS: dict[str, dict[str, Any]] = {
    "text": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "TRL, turns": {"prompt": [ASK], "chosen": [GOOD], "rejected": [BAD]},
    "TRL, the prompt within": {"chosen": [ASK, GOOD], "rejected": [ASK, BAD]},
    "UltraFeedback": {
        "prompt": "q",
        "prompt_id": "1",
        "chosen": [ASK, GOOD],
        "rejected": [ASK, BAD],
        "messages": [ASK, GOOD],
        "score_chosen": 8.0,
        "score_rejected": 2.0,
    },
    "LLaMA-Factory, ShareGPT": {
        "conversations": [HUMAN],
        "chosen": {"from": "gpt", "value": "good"},
        "rejected": {"from": "gpt", "value": "bad"},
    },
    "LLaMA-Factory, Alpaca": {"instruction": "q", "input": "", "chosen": "good", "rejected": "bad"},
    "hh-rlhf": {
        "chosen": "\n\nHuman: q\n\nAssistant: good",
        "rejected": "\n\nHuman: q\n\nAssistant: bad",
    },
    "a question": {"system": "", "question": "q", "chosen": "good", "rejected": "bad"},
}
JUDGED: dict[str, dict[str, Any]] = {
    "text": {"prompt": "q", "answer": "good", "good": True},
    "TRL": {"prompt": "q", "completion": "good", "label": True},
    "TRL, turns": {"prompt": [ASK], "completion": [GOOD], "label": True},
    "LLaMA-Factory": {"messages": [ASK, GOOD], "label": True},
    "ShareGPT": {"conversations": [HUMAN, {"from": "gpt", "value": "good"}], "label": "true"},
    "Alpaca": {"instruction": "q", "input": "", "output": "good", "kto_tag": 1},
}


def pairs(*rows: dict[str, Any], **settings: Any) -> Sequence[Record]:
    given = [Row(row, "a.json", at) for at, row in enumerate(rows, start=1)]
    return to_pairs(given, DataSettings(**settings)).records


def judged(*rows: dict[str, Any], **settings: Any) -> Sequence[Record]:
    given = [Row(row, "a.json", at) for at, row in enumerate(rows, start=1)]
    return to_judged(given, DataSettings(**settings)).records


def held(
    rows: Sequence[dict[str, Any]], folder: Path, tokenizer: Any, **settings: Any
) -> tuple[Federation, list[Example]]:
    file = folder / "rows.json"
    file.write_text(json.dumps(rows))
    objective: Objective = settings.pop("objective", DPO())
    defaults: dict[str, Any] = {"source": str(file), "num_clients": 1, "fractions": (1.0, 0.0, 0.0)}
    federation = federate(DataSettings(**(defaults | settings)), tokenizer, objective)
    return federation, [e for shard in federation.shards.values() for e in shard.train]


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_read_in_every_form(name: str) -> None:
    (record,) = pairs(PAIRS[name])
    assert [(m.role, m.content) for m in record.messages] == [("user", "q"), ("assistant", "good")]
    assert (record.answer, record.rejected, record.good) == ("good", "bad", None)


def test_one_answer_that_begins_as_a_conversation_does_is_an_answer() -> None:
    wrote = "Human: and you?\n\nAssistant: fine"
    (record,) = pairs({"prompt": "q", "chosen": "good", "rejected": wrote})
    assert (record.answer, record.rejected) == ("good", wrote)


@pytest.mark.parametrize("name", JUDGED)
def test_a_judged_answer_is_read_in_every_form(name: str) -> None:
    flag = next(column for column in ("good", "label", "kto_tag") if column in JUDGED[name])
    for value in (JUDGED[name][flag], False):
        (record,) = judged({**JUDGED[name], flag: value})
        assert [(m.role, m.content) for m in record.messages] == [
            ("user", "q"),
            ("assistant", "good"),
        ]
        assert (record.rejected, record.good) == ("", value is not False)


def test_earlier_answers_are_context_and_what_the_system_says_comes_first() -> None:
    (record,) = pairs(
        {"chosen": [*EARLIER, ASK, GOOD], "rejected": [*EARLIER, ASK, BAD]}, system="Be brief."
    )
    assert [(m.role, m.learn) for m in record.messages] == [
        ("system", True),
        ("user", True),
        ("assistant", False),
        ("user", True),
        ("assistant", True),
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"chosen": [ASK, GOOD], "rejected": [{"role": "user", "content": "other"}, BAD]},
            "must be alike up to their last answer",
        ),
        ({"chosen": [GOOD], "rejected": [BAD]}, "are answers without a question"),
        ({"chosen": "good", "rejected": "bad"}, "are answers without a question"),
        (
            {"prompt": "q", "chosen": [GOOD, ASK, GOOD], "rejected": [BAD]},
            "must be an answer each, or whole conversations",
        ),
        (
            {"prompt": "q", "completion": "a", "label": True},
            r"a pair must have .* chosen and rejected.*single answers with label are for objective: kto",
        ),
        ({"prompt": "q", "completion": "a"}, "a pair must have the columns chosen and rejected"),
    ],
)
def test_what_is_no_pair_is_one_sentence(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.json, row 1: .*{said}"):
        pairs(row)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "q", "answer": "a", "good": "maybe"},
            "good must be true or false, got .maybe.",
        ),
        ({"messages": [ASK], "label": True}, "must end in that answer"),
        ({"prompt": "q", "completion": "a"}, "a row must be prompt, answer and good"),
    ],
)
def test_what_is_not_judged_is_one_sentence(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=rf"^a\.json, row 1: .*{said}"):
        judged(row)


def test_a_format_has_no_effect_and_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.format must be auto for an objective of preferences"
    ):
        pairs(PAIRS["text"], format="alpaca")


def test_sft_names_the_objectives_that_learn_from_such_rows() -> None:
    def sft(row: dict[str, Any]) -> None:
        to_records([Row(row, "a.json", 1)], DataSettings())

    with pytest.raises(ValueError, match="set objective: dpo to learn which answer is preferred;"):
        sft(PAIRS["text"])
    with pytest.raises(ValueError, match="set objective: kto to learn from both"):
        sft(JUDGED["LLaMA-Factory"])
    renamed = (
        r"dpo to .*, with data\.columns=\{prompt: input, chosen: preferred_output, rejected: non"
    )
    openai = {
        "input": {"messages": [ASK]},
        "preferred_output": [GOOD],
        "non_preferred_output": [BAD],
    }
    with pytest.raises(ValueError, match=renamed):
        sft(openai)
    columns = {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"}
    (record,) = pairs(openai, columns=columns)
    assert (record.messages[0].content, record.answer, record.rejected) == ("q", "good", "bad")


def test_pairs_of_equal_answers_and_without_one_are_left_out_and_counted(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    row = PAIRS["text"]
    rows = [row, {**row, "rejected": " good "}, {**row, "rejected": ""}, {**row, "chosen": None}]
    federation, examples = held(rows, tmp_path, tiny_tokenizer)
    assert len(examples) == 1
    assert (federation.manifest.losses.num_equal, federation.manifest.num_empty) == (1, 2)
    assert any(
        "1 pairs left out: their answers are equal" in x for x in federation.manifest.left_out()
    )


def test_pairs_that_are_equal_once_cut_are_left_out_and_counted(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = [
        {"prompt": "q", "chosen": "a" * 60 + "x", "rejected": "a" * 60 + "y"},
        {"prompt": "q", "chosen": "a" * 20, "rejected": "b" * 60},
        {"prompt": "q" * 50, "chosen": "a", "rejected": "b"},
    ]
    federation, examples = held(rows, tmp_path, tiny_tokenizer, max_length=40)
    assert len(examples) == 1
    manifest = federation.manifest
    assert (manifest.losses.num_equal, manifest.num_truncated, manifest.num_dropped) == (1, 1, 1)


def test_where_prompts_give_way_both_answers_stand_behind_the_same_end_of_one(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    prompt = "".join(chr(97 + at % 26) for at in range(60))
    rows = [
        {"prompt": prompt, "chosen": "a" * 10, "rejected": "b" * 30},
        {"prompt": prompt, "chosen": "a" * 30, "rejected": "b" * 10},
        {"prompt": prompt, "chosen": "a", "rejected": "b" * 200},
    ]
    federation, examples = held(rows, tmp_path, tiny_tokenizer, max_length=64, truncate="prompt")
    assert (federation.manifest.num_truncated, federation.manifest.num_dropped) == (2, 1)
    for example in examples:
        assert example.rejected is not None
        at = example.prompt_length
        assert example.rejected.prompt_length == at
        assert example.ids[:at].tolist() == example.rejected.ids[:at].tolist()
        assert max(len(row.ids) for row in example.answers) == 64
        said = tiny_tokenizer.decode(example.ids[:at].tolist())
        assert prompt[-8:] in said.replace(" ", "")
        answers = [row.labels[row.labels != IGNORED].tolist() for row in example.answers]
        assert [len(answer) for answer in answers] in ([11, 31], [31, 11])


def test_both_answers_of_a_pair_stand_behind_the_same_tokens() -> None:
    """Of 200 pairs of the built-in corpus under the bundled model's tokenizer, in both kinds of prompt."""
    tokenizer = load_base(ModelSettings()).tokenizer
    rows = list(polyglot.rows(200, 5, polyglot.LANGUAGES, polyglot.TASKS))
    made = [
        Row(
            {
                "prompt": row["prompt"],
                "chosen": row["completion"],
                "rejected": rows[at - 7]["completion"],
            },
            "a",
            at,
        )
        for at, row in enumerate(rows)
    ]
    for prompt in ("chat", "plain"):
        settings = DataSettings(prompt=prompt)
        records = to_pairs(made, settings).records
        assert len(records) > 150
        for (example,) in DPO().examples(records, settings, tokenizer).examples:
            assert example.rejected is not None
            assert example.record is not None
            at = example.prompt_length
            assert at == example.rejected.prompt_length > 0
            assert example.ids[:at].tolist() == example.rejected.ids[:at].tolist()
            for row, text in zip(
                example.answers, (example.record.answer, example.record.rejected), strict=True
            ):
                assert (row.labels[:at] == IGNORED).all()
                assert row.labels[at:].tolist() == row.ids[at:].tolist()
                said = tokenizer.decode(row.ids[at:].tolist(), skip_special_tokens=True)
                assert said.strip() == text


def test_of_kto_every_answer_has_one_of_another_example_of_its_client(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    rows = [{"prompt": f"p{at}", "answer": f"a{at}", "good": at % 2 == 0} for at in range(6)]
    rows += [{"prompt": "pair", "chosen": "yes", "rejected": "no"}]
    federation, _ = held(rows, tmp_path, tiny_tokenizer, objective=KTO(), num_clients=2)
    for shard in federation.shards.values():
        held_here = [tiny_tokenizer.decode(e.labels[e.labels >= 0].tolist()) for e in shard.train]
        for example in shard.train:
            for row in example.answers:
                other = row.mismatched
                assert other is not None
                assert (
                    other.ids[: row.prompt_length].tolist() == row.ids[: row.prompt_length].tolist()
                )
                said = tiny_tokenizer.decode(other.labels[other.labels >= 0].tolist())
                assert said in (*held_here, "n o</s>", "no</s>")
                assert said != tiny_tokenizer.decode(row.labels[row.labels >= 0].tolist())


def test_a_single_example_of_kto_has_no_other_answer(tmp_path: Path, tiny_tokenizer: Any) -> None:
    _, (example,) = held([JUDGED["text"]], tmp_path, tiny_tokenizer, objective=KTO())
    assert example.mismatched is None


def test_the_split_is_another_where_the_rejected_answers_are(
    tmp_path: Path, tiny_tokenizer: Any
) -> None:
    row = PAIRS["text"]
    hashes = {
        held([{**row, "rejected": said}], tmp_path, tiny_tokenizer)[0].manifest.sha256
        for said in ("bad", "worse")
    }
    assert len(hashes) == 2
    federation, examples = held(
        [row, {**row, "rejected": "worse"}, row], tmp_path, tiny_tokenizer, duplicates="drop"
    )
    assert federation.manifest.duplicates.num_rows == 1
    assert len(examples) == 2
    assert len({example.key for example in examples}) == 2


def test_tokens_of_both_answers_are_counted(tmp_path: Path, tiny_tokenizer: Any) -> None:
    federation, (example,) = held([PAIRS["text"]], tmp_path, tiny_tokenizer)
    assert example.rejected is not None
    (counts,) = federation.manifest.clients.values()
    assert counts.tokens == len(example.ids) + len(example.rejected.ids) == example.num_tokens
    assert counts.target_tokens == example.num_targets == len("good") + len("bad") + 2
    plain = replace(example, rejected=None)
    assert plain.num_tokens == len(plain.ids)


def test_rows_are_not_packed(tmp_path: Path, tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.packing must be false for an objective of pref"):
        held([PAIRS["text"]], tmp_path, tiny_tokenizer, packing=True)
