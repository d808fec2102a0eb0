"""Which of two answers is better, asked as a question: both orders, one letter, and what is measured."""

import math
import re
from typing import Any

import pytest
import torch

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.tokens import IGNORED
from fedloom.objectives.forward import Forward
from fedloom.objectives.objective import Score
from fedloom.objectives.selector import QUESTION, Selector, SelectorScore, alone
from fedloom.recipe import RecipeError, build_recipe

ROOMY = DataSettings(max_length=600, prompt="plain")


def record(prompt: str, chosen: str, rejected: str) -> Record:
    messages = (Message("user", prompt), Message("assistant", chosen))
    return Record(messages, {}, chosen, rejected=rejected)


def made(*records: Record, tokenizer: Any, settings: DataSettings = ROOMY) -> Any:
    return Selector().examples(records, settings, tokenizer)


def said(example: Any, tokenizer: Any) -> str:
    return str(tokenizer.decode(example.ids.tolist()))


def test_a_pair_is_asked_in_both_orders_and_one_letter_is_learnt(tiny_tokenizer: Any) -> None:
    (ones,) = made(record("Two?", "yes", "no"), tokenizer=tiny_tokenizer).examples
    (example,) = ones
    first, second = alone(example)
    for row, answers, letter in ((first, ("yes", "no"), "A"), (second, ("no", "yes"), "B")):
        text = said(row, tiny_tokenizer)
        found = re.search(r"### RESPONSE A\n(.*)\n\n### RESPONSE B\n(.*)\n\n", text)
        assert found is not None
        assert found.groups() == answers
        learnt = row.labels[row.labels != IGNORED]
        assert tiny_tokenizer.decode(learnt.tolist()) == letter
        assert row.choices is not None
        assert len(row.choices) == 2
    assert example.num_targets == 2
    assert example.good is None


def test_an_answer_that_holds_a_place_of_the_question_stays_as_it_is(tiny_tokenizer: Any) -> None:
    (ones,) = made(record("Two?", "{b} and {prompt}", "no"), tokenizer=tiny_tokenizer).examples
    assert "### RESPONSE A\n{b} and {prompt}\n" in said(ones[0], tiny_tokenizer)


def test_where_there_is_no_room_both_answers_give_way_alike(tiny_tokenizer: Any) -> None:
    """Nothing of the question's own words is lost, and what is short stays whole."""
    short = DataSettings(max_length=400, prompt="plain")
    long = record("Two?", "y" * 500, "n" * 900)
    found = made(long, tokenizer=tiny_tokenizer, settings=short)
    ((example,),) = found.examples
    text = said(example, tiny_tokenizer)
    parts = re.search(r"QUERY\n(.*)\n\n### RESPONSE A\n(y+)\n\n### RESPONSE B\n(n+)\n\n", text)
    assert parts is not None
    assert parts[1] == "Two?"
    assert len(parts[2]) == len(parts[3]) > 20
    assert len(example.ids) <= 400
    assert (found.num_truncated, found.num_dropped, found.num_equal) == (1, 0, 0)


def test_answers_that_are_equal_where_they_are_cut_leave_nothing_to_decide(
    tiny_tokenizer: Any,
) -> None:
    short = DataSettings(max_length=400, prompt="plain")
    alike = record("Two?", "y" * 500 + "a", "y" * 500 + "b")
    found = made(alike, record("Two?", "yes", "no"), tokenizer=tiny_tokenizer, settings=short)
    assert [len(each) for each in found.examples] == [0, 1]
    assert found.num_equal == 1


def test_a_question_without_room_is_refused_with_the_length_it_needs(tiny_tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"data\.max_length must be at least \d+ for") as refused:
        made(
            record("Two?", "yes", "no"),
            tokenizer=tiny_tokenizer,
            settings=DataSettings(max_length=64, prompt="plain"),
        )
    least = int(re.findall(r"at least (\d+)", str(refused.value))[0])
    settings = DataSettings(max_length=least, prompt="plain")
    assert made(record("Two?", "yes", "no"), tokenizer=tiny_tokenizer, settings=settings).examples


def test_a_conversation_is_told_turn_by_turn(tiny_tokenizer: Any) -> None:
    talk = record("And now?", "yes", "no")
    before = (Message("user", "One?"), Message("assistant", "One.", learn=False))
    longer = Record((*before, *talk.messages), {}, "yes", rejected="no")
    ((example,),) = made(longer, tokenizer=tiny_tokenizer).examples
    assert "User: One?\n\nAssistant: One.\n\nUser: And now?" in said(example, tiny_tokenizer)


def test_one_answer_is_no_pair(tiny_tokenizer: Any) -> None:
    single = Record((Message("user", "?"), Message("assistant", "yes")), {}, "yes")
    with pytest.raises(ValueError, match="a selector compares two answers, got one"):
        made(single, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("question", ["Which?", QUESTION.replace("{b}", "{a}")])
def test_a_question_must_name_prompt_and_answers_once(question: str) -> None:
    with pytest.raises(RecipeError, match=r"objective\.selector\.question must have \{"):
        build_recipe({"name": "x", "objective": {"selector": {"question": question}}})


def test_packed_rows_and_scores_of_written_answers_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.packing must be false"):
        build_recipe({"name": "x", "objective": "selector", "data": {"packing": True}})
    with pytest.raises(RecipeError, match="classification and selector have none of"):
        build_recipe({"name": "x", "objective": "selector", "evaluation": {"metrics": ["chrf"]}})


def test_metrics_are_of_both_orders_together() -> None:
    """A model that always takes the first answer is right on half of the questions, and prefers nothing."""
    sure = SelectorScore(0.0, 1, 2, 0, 0.0, 2)
    right = SelectorScore(-2 * math.log(0.9), 2, 2, 0, math.log(9), 1)
    wrong = SelectorScore(-2 * math.log(0.2), 0, 2, 1, math.log(0.25), 1)
    found = Selector().metrics([sure, right, wrong])
    assert found["accuracy"] == 0.5
    assert found["preference_accuracy"] == 0.5  # a tie, a hit, a miss
    assert found["first_chosen"] == pytest.approx(4 / 6)
    assert found["preference_margin"] == pytest.approx((math.log(9) + math.log(0.25)) / 3)
    assert found["num_pairs"] == 3
    assert found["loss"] == pytest.approx(-(math.log(0.9) + math.log(0.2)) / 3)


def test_of_two_answers_that_are_alike_neither_is_preferred(
    tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    """However much a model likes the first place: the log-odds of both orders cancel."""
    model = tiny_llama(vocab=len(tiny_tokenizer)).eval()
    ((example,),) = made(record("Two?", "yes", "no"), tokenizer=tiny_tokenizer).examples
    first, second = alone(example)
    # The same text twice, of which A is right once and B once.
    same = torch.where(first.labels == IGNORED, first.labels, second.labels[second.labels >= 0])
    alike = type(first)(first.ids, same, first.prompt_length, choices=first.choices)
    symmetric = type(first)(
        first.ids, first.labels, first.prompt_length, choices=first.choices, rejected=alike
    )
    selector = Selector()
    batch = selector.batch([[symmetric]], [2], torch.zeros(1), pack=False)
    (score,) = selector.scores(Forward.of(model), batch)
    assert isinstance(score, SelectorScore)
    assert score.margin == pytest.approx(0.0, abs=1e-6)
    assert score.firsts in (0, 2)
    assert score.correct == 1


def test_the_loss_is_the_mean_over_questions_of_the_letters_alone(
    tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer)).eval()
    pairs = [record("Two?", "yes", "no"), record("Three, or four?", "four", "3")]
    examples = [one for (one,) in made(*pairs, tokenizer=tiny_tokenizer).examples]
    selector = Selector()
    expected = []
    for row in (row for example in examples for row in alone(example)):
        logits = model(input_ids=row.ids[None]).logits[0]
        at = int((row.labels != IGNORED).nonzero())
        assert row.choices is not None
        among = logits[at - 1, row.choices].log_softmax(0)
        expected.append(-float(among.detach()[row.choices.tolist().index(int(row.labels[at]))]))
    batch = selector.batch([examples], [selector.count(examples)], torch.zeros(1), pack=False)
    loss = float(selector.losses(Forward.of(model), batch).detach())
    assert loss == pytest.approx(sum(expected) / 4, abs=1e-5)
    scores = selector.scores(Forward.of(model), batch)
    assert all(isinstance(score, Score) for score in scores)
    assert sum(score.loss for score in scores) == pytest.approx(sum(expected), abs=1e-5)


def test_clients_side_by_side_learn_what_each_learns_alone(
    tiny_llama: Any, tiny_tokenizer: Any
) -> None:
    model = tiny_llama(vocab=len(tiny_tokenizer), dtype=torch.float64).eval()
    pairs = [record("Two?", "yes", "no"), record("Three, or four?", "four", "3")]
    examples = [one for (one,) in made(*pairs, tokenizer=tiny_tokenizer).examples]
    selector, like = Selector(), torch.zeros(1, dtype=torch.float64)

    def losses(*lanes: Any) -> list[float]:
        counts = [selector.count(lane) for lane in lanes]
        batch = selector.batch(lanes, counts, like, pack=False)
        found: list[float] = selector.losses(Forward.of(model), batch).tolist()
        return found

    together = losses(examples[:1], examples[1:])
    alone_each = [*losses(examples[:1]), *losses(examples[1:])]
    assert together == pytest.approx(alone_each, abs=1e-12)
