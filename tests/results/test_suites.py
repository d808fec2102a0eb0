"""Public tests of a run's models: by hand where a table of likelihoods is given, whole on a tiny model."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedloom
from fedloom import cli
from fedloom.core.metrics import Metric
from fedloom.evaluation.generation import Generation
from fedloom.results import suites
from fedloom.results.suite_results import (
    SuiteResult,
    chance,
    compared,
    interval,
    keep,
    read_results,
)
from fedloom.results.suites import Asked, run_suite, shown_sha256
from fedloom.suites.likelihood import Continuation, Likelihood

QUESTIONS = [
    {"question": f"Is {x} {y}?", "subject": s, "choices": ["no", "yes, it is"], "answer": a}
    for x, y, a, s in (
        ("ice", "cold", 1, "ice"),
        ("fire", "cold", 0, "fire"),
        ("ice", "hot", 0, "ice"),
        ("fire", "hot", 1, "fire"),
        ("tea", "wet", 1, "ice"),
        ("sand", "wet", 0, "fire"),
    )
]
SUMS = [{"question": f"{x} + 1?", "answer": f"Count. #### {x + 1}"} for x in range(7)]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a small suite of each kind."""
    folder = tmp_path_factory.mktemp("suites")
    for name, rows in (("questions", QUESTIONS), ("sums", SUMS)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    program = {
        "task_id": "0",
        "prompt": "def f():\n",
        "entry_point": "f",
        "test": "def check(f): f()",
    }
    (folder / "programs.jsonl").write_text(json.dumps(program))
    return folder


def given(table: dict[str, float]) -> Callable[..., list[Likelihood]]:
    """Return what stands for a model: log-likelihoods by the text that is gone on with, 0 for others."""

    def judge(_model: Any, _tokenizer: Any, asked: Sequence[Continuation], **_: Any) -> Any:
        return [Likelihood(table.get(each.text, 0.0), False, 1) for each in asked]

    return judge


def test_the_most_likely_option_is_chosen_as_it_is_and_by_byte(
    files: Path,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer))
    asked = Asked("arc", files / "questions.jsonl")
    # -3 of two bytes against -5 of ten: "no" as it is, "yes, it is" by byte.
    monkeypatch.setattr(suites, "likelihoods", given({" no": -3.0, " yes, it is": -5.0}))
    found = run_suite(model, tiny_tokenizer, "global", asked)
    assert found.scores == {"accuracy": 3 / 6, "accuracy by byte": 3 / 6}
    assert found.values == [0, 1, 1, 0, 0, 1]
    # Of equals the first.
    monkeypatch.setattr(suites, "likelihoods", given({}))
    assert run_suite(model, tiny_tokenizer, "global", asked).values == found.values
    assert found.low == pytest.approx(0.1876, abs=1e-4)
    assert found.high == pytest.approx(0.8124, abs=1e-4)


def test_worked_examples_are_of_the_subject_and_not_asked(
    files: Path,
    tmp_path: Path,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = list[str]()

    def judge(_model: Any, _tokenizer: Any, asked: Sequence[Continuation], **_: Any) -> Any:
        seen.extend(each.context for each in asked)
        return [Likelihood(0.0, True, 1) for _ in asked]

    monkeypatch.setattr(suites, "likelihoods", judge)
    model = tiny_llama(vocab=len(tiny_tokenizer))
    found = run_suite(model, tiny_tokenizer, "m", Asked("mmlu", files / "questions.jsonl", shots=1))
    assert found.num == 4
    assert found.scores.keys() == {"accuracy"}
    assert seen[0] == (
        "The following are multiple choice questions (with answers) about ice.\n\n"
        "Is ice cold?\nA. no\nB. yes, it is\nAnswer: B\n\nIs ice hot?\nA. no\nB. yes, it is\nAnswer:"
    )
    with pytest.raises(ValueError, match="has no items left besides the 3 worked examples"):
        run_suite(model, tiny_tokenizer, "m", Asked("mmlu", files / "questions.jsonl", shots=3))
    # Nor where they are named, in a file that holds both.
    twice = Asked("mmlu", files / "questions.jsonl", shots=1, examples=files / "questions.jsonl")
    assert shown_sha256(twice) == found.prompts_sha256
    few = tmp_path / "few.jsonl"
    few.write_text(json.dumps(QUESTIONS[0]))
    with pytest.raises(ValueError, match="has 0 worked examples of the subject 'fire', and 1 are"):
        shown_sha256(Asked("mmlu", files / "questions.jsonl", shots=1, examples=few))
    # Options are shown as questions are: of others the result is another.
    other = tmp_path / "other.jsonl"
    other.write_text(files.joinpath("questions.jsonl").read_text().replace("yes, it is", "maybe"))
    hashes = {shown_sha256(Asked("arc", file)) for file in (other, files / "questions.jsonl")}
    assert len(hashes) == 2


def test_sums_are_judged_by_what_is_written(
    files: Path,
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    answering: Callable[[Mapping[str, str]], None],
) -> None:
    sums = [
        json.loads(line)["question"] for line in (files / "sums.jsonl").read_text().splitlines()
    ]
    texts = (" Count. #### 6\n\nQuestion: 9", " so it is 7.")
    answering({f"{sums[at]}\nAnswer:": text for at, text in enumerate(texts, len(sums) - 2)})
    model = tiny_llama(vocab=len(tiny_tokenizer))
    found = run_suite(model, tiny_tokenizer, "m", Asked("gsm8k", files / "sums.jsonl"))
    assert found.num == 2
    assert found.scores == {"exact match behind ####": 0.5, "exact match of the last number": 1.0}


def test_answers_about_a_text_are_those_up_to_the_end_of_a_line(
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    answering: Callable[[Mapping[str, str]], None],
) -> None:
    rows = [
        {"context": "Ice is cold.", "question": f"{x}?", "answers": {"text": ["cold", "the ice"]}}
        for x in range(2)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answering(
        {"Question: 0?\n\nAnswer:": " Ice!\nand fire", "Question: 1?\n\nAnswer:": " very cold"}
    )
    model = tiny_llama(vocab=len(tiny_tokenizer))
    found = run_suite(model, tiny_tokenizer, "m", Asked("xquad", tmp_path / "rows.jsonl"))
    assert found.scores == {"exact match": 0.5, "F1 of words": pytest.approx(5 / 6)}
    assert found.values == [1.0, 0.0]


@pytest.mark.parametrize(
    ("suite", "metrics", "new"),
    [("own", ["exact_match", "chrf"], 3), ("natural_instructions", None, 128)],
)
def test_rows_of_ones_own_are_shown_as_clients_are_shown_theirs(
    suite: str,
    metrics: list[str] | None,
    new: int,
    small_recipe: Callable[..., Any],
    tiny_llama: Callable[..., Any],
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shown = list[str]()
    longest = list[int]()

    def write(self: Generation, _model: Any, prompts: Sequence[Any], _ends: Any) -> list[str]:
        shown.extend(tiny_tokenizer.decode(prompt.tolist()) for prompt in prompts)
        longest.append(self.max_new_tokens)
        return ["Cold", "no"]

    rows = [
        {"instruction": "Say it.", "input": x, "output": y}
        for x, y in (("a", "cold"), ("b", "hot"))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(Generation, "answers", write)
    # A run that generates nothing itself is asked all the same.
    evaluation = {"max_new_tokens": 3, **({"metrics": metrics} if metrics else {"generate": False})}
    recipe = small_recipe(data={"prompt": "alpaca"}, evaluation=evaluation)
    if metrics:  # of one's own those that are from 0 to 1
        own = (
            Metric("sure", bounds=(0.0, 1.0), score=lambda *_: 1.0),
            Metric("length", score=lambda answer, _: len(answer)),
        )
        named = replace(recipe.evaluation, metrics=(*metrics, *own))
        recipe = replace(recipe, evaluation=named)
    model = tiny_llama(vocab=len(tiny_tokenizer))
    asked = Asked(suite, tmp_path / "rows.jsonl")
    found = run_suite(model, tiny_tokenizer, "m", asked, recipe=recipe)
    assert shown[0].endswith("### Input:\na\n\n### Response:\n")
    assert longest == [new]
    if metrics:
        assert list(found.scores) == ["exact match", "chrF", "sure"]
        assert found.values == [1.0, 0.0]
    else:
        assert list(found.scores) == ["ROUGE-L (rouge 1.0.1)", "exact match"]
        # Of one word each, which case tells apart there.
        assert found.values == [0.0, 0.0]
    with pytest.raises(ValueError, match="is shown in the template of a run"):
        run_suite(model, tiny_tokenizer, "m", asked)


def test_what_is_asked_wrongly_is_one_sentence(files: Path) -> None:
    for make, said in (
        (lambda: Asked("mmul", files), "a suite must be one of gsm8k, mmlu, humaneval, xquad"),
        (
            lambda: Asked("own"),
            "needs to be told where its items are: a file or folder, as in own=test.jsonl",
        ),
        (lambda: Asked("natural_instructions", files, shots=1), "has no worked examples"),
        (lambda: Asked("arc", files, limit=0), "limit must be at least 1, got 0"),
        (lambda: Asked("arc", files, shots=-1), "shots must be at least 0, got -1"),
        (lambda: Asked("humaneval", files / "programs.jsonl"), "allow that with --allow-code"),
        (lambda: Asked("humaneval", files, shots=1, allow_code=True), "has no worked examples"),
        (
            lambda: Asked("arc", files, examples=files),
            "examples has no effect without worked examples",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            make()


def test_mcnemar_is_exact() -> None:
    one = [True] * 10 + [False] * 2 + [True] * 5 + [False] * 3
    other = [False] * 10 + [True] * 2 + [True] * 5 + [False] * 3
    # 2 of 12 or fewer, both ways: 2 (1 + 12 + 66) / 4096.
    assert chance(one, other) == pytest.approx(158 / 4096)
    assert chance(one, one) == 1.0


def test_results_are_compared_where_questions_and_measure_are_the_same() -> None:
    def result(measure: str, prompts: str = "a") -> SuiteResult:
        how = (1, {measure: 1.0, "chrF": 0.5}, 0.2, 1.0, [1.0], 0, prompts, "f", 0.1)
        return SuiteResult("own", "global", *how)

    own = result("exact match")
    assert len(compared([own], {"other": [result("exact match"), own]})) == 1
    assert not compared([own], {"other": [result("ROUGE-L"), result("exact match", "b")]})


def test_what_is_more_or_less_right_is_compared_by_a_paired_t_test() -> None:
    one, other = [0.5, 0.75, 1.0], [0.25, 0.25, 0.25]
    # Differences of a mean of 0.5 and a standard error of 0.25 / sqrt(3): t is 3.4641 with two degrees of freedom.
    assert chance(one, other) == pytest.approx(0.0742, abs=1e-4)
    assert interval(one) == pytest.approx((0.75 - 4.3027 * 0.25 / 3**0.5, 1.0), abs=1e-4)
    assert interval([0.5]) == (0.0, 1.0)


@pytest.mark.slow
def test_a_run_is_asked_beside_its_base_and_the_run_stays_as_it_was(
    files: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (
        f"model.name={tiny_folder}",
        "run.rounds=1",
        "run.baselines=[]",
        "data.num_examples=60",
        "data.max_length=96",
        "evaluation.max_new_tokens=2",
    )
    result = fedloom.run("quickstart", tmp_path / "run", overrides=settings)
    state = result.summary["state_sha256"]
    words = ["suite", str(tmp_path / "run"), f"arc={files / 'questions.jsonl'}", "--base"]
    said = CliRunner().invoke(cli.app, words)
    assert said.exit_code == 0, said.output
    assert "points beside the model before training on the same 6 items, McNemar's p" in " ".join(
        said.output.split()
    )
    kept = read_results(tmp_path / "run")
    assert [each.model for each in kept] == ["base", "global"]
    assert len({each.prompts_sha256 for each in kept}) == 1
    assert fedloom.open_run(tmp_path / "run").summary["state_sha256"] == state
    # Asked again, it is the same, and kept once.
    (again,) = fedloom.open_run(tmp_path / "run").suites([Asked("arc", files / "questions.jsonl")])
    assert (again.values, again.scores) == (kept[1].values, kept[1].scores)
    assert len(read_results(tmp_path / "run")) == 2
    sums = Asked("gsm8k", files / "sums.jsonl", shots=1, limit=2)
    (found,) = fedloom.open_run(tmp_path / "run").suites([sums])
    assert isinstance(found, SuiteResult)
    assert found.num == 2
    program = Asked("humaneval", files / "programs.jsonl", allow_code=True)
    (found,) = fedloom.open_run(tmp_path / "run").suites([program])
    assert found.num == 1
    # One that cannot be asked is refused before the others are; what was asked stays where a later one fails.
    wrong = Asked("arc", files / "questions.jsonl", sha256="0" * 64)
    kept = read_results(tmp_path / "run")
    with pytest.raises(ValueError, match="has the sha256"):
        fedloom.open_run(tmp_path / "run").suites([Asked("own", files / "sums.jsonl"), wrong])
    assert read_results(tmp_path / "run") == kept
    fails = Asked("humaneval", files / "programs.jsonl", allow_code=True)
    with monkeypatch.context() as broken:
        broken.setattr(suites, "passes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fedloom.open_run(tmp_path / "run").suites([Asked("own", files / "sums.jsonl"), fails])
    assert read_results(tmp_path / "run")[-1].suite == "own"
    for more, told in (
        (["--beside", str(tmp_path)], "has no results of public tests"),
        (["--allow-code"], "--allow-code has no effect"),
    ):
        said = CliRunner().invoke(cli.app, [*words, *more])
        assert told in str(said.exception)
    keep(tmp_path, kept)
    said = CliRunner().invoke(cli.app, [*words, "--limit", "2", "--beside", str(tmp_path)])
    assert "was asked other questions, or in another form: nothing to" in " ".join(
        said.output.split()
    )
