"""Which answers are asked for, and end tokens that a file writes itself."""

from typing import Any

import pytest

from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.targets import asked, posed, unended
from fedloom.data.tokens import IGNORED, Example, tokenise


def record(*turns: str, roles: str = "ua", unlearnt: tuple[int, ...] = ()) -> Record:
    names = {"u": "user", "a": "assistant", "s": "system"}
    messages = tuple(
        Message(names[roles[at % len(roles)]], said, learn=at not in unlearnt)  # type: ignore[arg-type]  # roles
        for at, said in enumerate(turns)
    )
    return Record(messages, {}, turns[-1])


def learnt(example: Example, tokenizer: Any) -> str:
    return str(tokenizer.decode([token for token in example.labels.tolist() if token != IGNORED]))


# --- end tokens in the data ----------------------------------------------------------------------


def test_an_end_token_that_ends_every_answer_is_taken_off_and_that_is_said(byte_level: Any):
    made = tokenise(
        [record("Hi", "Hello </s>"), record("Ho", "Paris</s>")],
        DataSettings(prompt="plain"),
        byte_level,
    )
    told = [byte_level.decode(example.ids.tolist()) for (example,) in made.examples]
    assert told == ["Hi\nHello</s>", "Ho\nParis</s>"]
    compared = [example.record and example.record.answer for (example,) in made.examples]
    assert compared == ["Hello", "Paris"]
    (said,) = made.notes
    assert (
        said
        == "the text </s> ends every answer and was taken off: the end token itself follows each"
    )


def test_an_end_token_that_ends_some_answers_is_what_they_say(byte_level: Any):
    given = [record("Hi", "It is </s>"), record("Ho", "Paris")]
    ((ends,), _) = tokenise(given, DataSettings(prompt="plain"), byte_level).examples
    assert learnt(ends, byte_level) == "It is </s></s>"
    assert (ends.ids == byte_level.eos_token_id).sum() == 1


def test_questions_lose_it_only_where_all_of_them_end_so():
    both = [record("Hi</s>", "a</s>"), record("Ho</s>", "b</s>")]
    found, taken = unended(both, ["</s>"])
    assert ([one.messages[0].content for one in found], taken) == (["Hi", "Ho"], ("</s>",))
    one = [record("What is </s>", "a</s>"), record("Ho", "b</s>")]
    found, _ = unended(one, ["</s>"])
    assert [one.messages[0].content for one in found] == ["What is </s>", "Ho"]


def test_earlier_answers_lose_it_with_the_last_ones():
    (found,), _ = unended([record("Hi", "a</s>", "Ho", "b</s>")], ["</s>"])
    assert [message.content for message in found.messages] == ["Hi", "a", "Ho", "b"]


def test_all_the_ends_that_every_answer_has_are_taken_off():
    (found,), taken = unended([record("Hi", "a<turn> </s>")], ["</s>", "<turn>"])
    assert (found.answer, taken) == ("a", ("<turn>", "</s>"))


def test_an_answer_of_nothing_else_is_no_answer(byte_level: Any):
    given = [record("Hi", "a</s>"), record("Ho", "</s>"), record("Hi", "a</s>", "Ho", "</s>")]
    made = tokenise(given, DataSettings(prompt="plain"), byte_level)
    ((_,), (), (earlier,)) = made.examples
    assert made.num_empty == 1
    assert learnt(earlier, byte_level) == "a</s>"


# --- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["chat", "alpaca", "vicuna", "plain"])
def test_an_answer_that_is_not_learnt_is_context_and_so_is_its_end(prompt: str, tokenizer: Any):
    """A turn of weight 0, in the middle: its tokens stay, no target is among them."""
    turns = ("What is it?", "Paris", "And ten?", "eight", "Count", "five")
    settings = DataSettings(prompt=prompt)
    given = [record(*turns), record(*turns, unlearnt=(3,)), record(*turns, unlearnt=(1, 3))]
    (whole,), (without,), (last,) = tokenise(given, settings, tokenizer).examples
    assert whole.ids.tolist() == without.ids.tolist() == last.ids.tolist()
    ends = [(one.labels == tokenizer.eos_token_id).sum() for one in (whole, without, last)]
    assert ends == [3, 2, 1]
    assert "eight" not in learnt(without, tokenizer)
    assert (
        learnt(last, tokenizer).strip()
        == learnt(whole, tokenizer)[-len(learnt(last, tokenizer)) :].strip()
    )
    assert whole.prompt_length == without.prompt_length == last.prompt_length


def test_a_conversation_ends_in_the_last_answer_that_is_learnt(byte_level: Any):
    """What is compared is what is asked for."""
    given = record("Hi", "Paris", "Ho", "never", unlearnt=(3,))
    ((example,),) = tokenise([given], DataSettings(prompt="plain"), byte_level).examples
    assert example.record is not None
    assert example.record.answer == example.record.messages[-1].content == "Paris"
    assert byte_level.decode(example.ids.tolist()) == "Hi\nParis</s>"


def test_a_conversation_without_an_answer_to_learn_is_counted(byte_level: Any):
    given = [record("Hi", "Paris", unlearnt=(1,)), record("Hi", "Paris")]
    made = tokenise(given, DataSettings(prompt="plain"), byte_level)
    assert [len(one) for one in made.examples] == [0, 1]
    assert (made.num_empty, made.num_dropped) == (1, 0)


def test_of_a_classifier_only_the_last_answer_counts():
    given = record("Hi", "Paris", "Ho", "A")
    found = asked(given, only_last=True)
    assert found is not None
    assert [message.learn for message in found.messages if message.role == "assistant"] == [
        False,
        True,
    ]
    assert asked(record("Hi", "A", "Ho", "B", unlearnt=(3,)), only_last=True) is None


def test_a_question_is_posed_as_the_data_is_opened():
    settings = DataSettings(system="Be brief.")
    found = posed(
        [Message("user", "Hi"), Message("assistant", "Hello"), Message("user", "Ho")], settings
    )
    assert [message.role for message in found.messages] == [
        *("system", "user", "assistant", "user", "assistant"),
    ]
    assert [message.learn for message in found.messages][-3:] == [False, False, True]
