"""Conversations as a tokenizer's own chat template writes them, cut where generation would begin and end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedloom.data.control import Vocabulary
from fedloom.data.formats import Message
from fedloom.data.prompts import PROMPTS, Segment


class ChatTemplate(Vocabulary, Protocol):
    """What of a tokenizer writes a conversation."""

    @property
    def eos_token(self) -> str | None:
        """Return the text of the end-of-sequence token."""
        ...

    @property
    def chat_template(self) -> str | Mapping[str, str] | None:
        """Return the template, if there is one."""
        ...

    def apply_chat_template(
        self, conversation: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> object:
        """Return the text of the conversation."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateWriter:
    """The chat template of a tokenizer."""

    tokenizer: ChatTemplate

    def __call__(self, messages: Sequence[Message]) -> list[tuple[Segment, ...]]:
        """Return the sequence of the conversation, or one for each answer that is learnt.

        A template that rewrites earlier turns once later ones follow (it drops their reasoning) cannot show every
        answer as it was generated in one sequence: each answer then gets a sequence of its own.
        """
        segments: list[Segment] = []
        done = ""
        generated = self._generated(messages)
        for prompt, full in generated:
            if not prompt.startswith(done):
                return self._one_by_one(generated)
            answer, tail, closed = self._answer(full)
            segments += [
                Segment(prompt[len(done) :], learn=False),
                Segment(answer, learn=True, end=closed),
            ]
            done = prompt + full.removesuffix(tail)
        # A template that ends a turn with another token still has to end the sequence.
        segments[-1] = replace(segments[-1], end=True)
        return [tuple(segments)]

    def sample(self) -> str:
        """Return what the template writes around what is said; what it refuses to is left out."""
        turns = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
        texts = []
        for messages in (turns, [Message("system", "s"), *turns[:1]]):
            try:
                texts.append(self._written(messages, generate=False))
            except ValueError:
                continue
        return "\0".join(texts)

    def _one_by_one(self, generated: Sequence[tuple[str, str]]) -> list[tuple[Segment, ...]]:
        return [
            (Segment(prompt, learn=False), Segment(self._answer(full)[0], learn=True, end=True))
            for prompt, full in generated
        ]

    def _generated(self, messages: Sequence[Message]) -> list[tuple[str, str]]:
        """Return, of every answer that is learnt, the text before it and what the template writes from there on."""
        pairs = []
        for at, message in enumerate(messages):
            if message.role != "assistant" or not message.learn:
                continue
            prompt = self._written(messages[:at], generate=True)
            _check_systems(messages[:at], prompt)
            whole = self._written(messages[: at + 1], generate=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    "the chat template of model.name does not write a conversation as its generation prompt and "
                    f"then the answer: set data.prompt to one of {', '.join(PROMPTS)}"
                )
            pairs.append((prompt, whole[len(prompt) :]))
        return pairs

    def _answer(self, text: str) -> tuple[str, str, bool]:
        """Return (answer, what the template writes behind its end token, whether it writes that token)."""
        answer, eos, tail = text.partition(self.tokenizer.eos_token or "\0")
        if eos:
            return answer, tail, True
        return text.rstrip(), text[len(text.rstrip()) :], False

    def _written(self, messages: Sequence[Message], *, generate: bool) -> str:
        from jinja2 import TemplateError  # only a failing template needs it

        chat = [{"role": message.role, "content": message.content} for message in messages]
        write = self.tokenizer.apply_chat_template
        try:
            return str(write(chat, tokenize=False, add_generation_prompt=generate))
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(_refusal(messages, str(error))) from error


def holds(text: str, part: str) -> bool:
    """Return whether `said` stands in `text`, white space aside."""
    return part in text or "".join(part.split()) in "".join(text.split())


def _check_systems(messages: Sequence[Message], written: str) -> None:
    """Refuse a template that passes over what the system says."""
    systems = [message.content for message in messages if message.role == "system"]
    if not all(holds(written, system) for system in systems):
        raise ValueError(_refusal(messages, "it leaves what the system says out"))


def _refusal(messages: Sequence[Message], reason: str) -> str:
    roles = [message.role for message in messages]
    first = (
        "set data.system_role to fold"
        if "system" in roles
        else "join turns of one role that follow each other"
    )
    return (
        f"the chat template of model.name refuses the roles {', '.join(roles)} ({reason}): {first}, or "
        f"data.prompt to one of {', '.join(PROMPTS)}"
    )
