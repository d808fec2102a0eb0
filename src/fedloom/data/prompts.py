"""From a conversation to stretches of text, each learnt or not."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedloom.data.formats import Message, Record
from fedloom.data.settings import DataSettings


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the text of a conversation."""

    text: str
    learn: bool
    """Whether its tokens are targets."""
    end: bool = False
    """Whether the end-of-sequence token follows it."""


@dataclass(frozen=True, slots=True)
class Rendering:
    """One sequence to learn from; its last learnt segment answers `record`."""

    segments: tuple[Segment, ...]
    record: Record


Render = Callable[[Record], list[Rendering]]


class ChatTemplate(Protocol):
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
class Turns:
    """A prompt written role by role; `{content}` stands for what is said."""

    user: str
    assistant: str
    system: str | None = None
    default_system: str = ""
    """Said where the conversation has no system message."""
    user_with_context: str = ""
    """With `{instruction}` and `{context}`, for messages that keep the two apart."""
    default_system_with_context: str = ""
    """Said instead where the first message has a context."""

    def __call__(self, record: Record) -> list[Rendering]:
        """Return the one sequence of the conversation."""
        segments: list[Segment] = []
        pending = self._opening(record.messages)
        before, _, after = self.assistant.partition("{content}")
        # A space before the answer belongs to its first token in most vocabularies.
        bare = before.rstrip(" ")
        for message in record.messages:
            if message.role == "system":
                pending += _filled(self.system or "", {"content": message.content})
            elif message.role == "user":
                pending += self._said(message)
            else:
                segments.append(Segment(pending + bare, learn=False))
                answer = before[len(bare) :] + message.content + after.rstrip()
                segments.append(Segment(answer, learn=True, end=True))
                pending = after[len(after.rstrip()) :]
        return [Rendering(tuple(segments), record)]

    def _opening(self, messages: Sequence[Message]) -> str:
        if any(message.role == "system" for message in messages):
            if self.system is None:
                raise ValueError(
                    "data.prompt needs a text for the role system, got only user and assistant"
                )
            return ""
        first = next(message for message in messages if message.role == "user")
        return (first.context and self.default_system_with_context) or self.default_system

    def _said(self, message: Message) -> str:
        if not (message.context and self.user_with_context):
            return _filled(self.user, {"content": message.content})
        instruction = message.content.removesuffix(message.context).rstrip()
        parts = {"instruction": instruction, "context": message.context}
        return _filled(self.user_with_context, parts)


PROMPTS: dict[str, Turns] = {
    # Taori et al., Stanford Alpaca, with and without input.
    "alpaca": Turns(
        system="{content}\n\n",
        user="### Instruction:\n{content}\n\n",
        user_with_context="### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n",
        assistant="### Response:\n{content}\n\n",
        default_system="Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n",
        default_system_with_context="Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the request.\n\n",
    ),
    # Chiang et al., Vicuna, version 1.1.
    "vicuna": Turns(
        system="{content} ",
        user="USER: {content} ",
        assistant="ASSISTANT: {content}",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. ",
    ),
    "plain": Turns(system="{content}\n\n", user="{content}\n", assistant="{content}\n"),
}


def make_render(settings: DataSettings, tokenizer: ChatTemplate) -> Render:
    """Return how conversations are written under `data.prompt`."""
    if not tokenizer.eos_token:
        raise ValueError(
            "the tokenizer of model.name has no end-of-sequence token, so no answer could end"
        )
    if isinstance(settings.prompt, Mapping):
        return _without(tokenizer.eos_token, _own(settings.prompt))
    if settings.prompt != "chat":
        return _without(tokenizer.eos_token, PROMPTS[settings.prompt])
    if not tokenizer.chat_template:
        raise ValueError(
            "data.prompt is chat, but the tokenizer of model.name has no chat template: "
            f"set data.prompt to one of {', '.join(PROMPTS)}"
        )
    return _without(tokenizer.eos_token, lambda record: _chat(record, tokenizer))


def _chat(record: Record, tokenizer: ChatTemplate) -> list[Rendering]:
    """Write a conversation with the tokenizer's template, cut where generation would begin and end.

    A template that rewrites earlier turns once later ones follow (it drops their reasoning) cannot show every
    answer as it was generated in one sequence: each answer then gets a sequence of its own.
    """
    segments: list[Segment] = []
    done = ""
    for i, message in enumerate(record.messages):
        if message.role != "assistant":
            continue
        prompt = _written(record.messages[:i], tokenizer, generate=True)
        whole = _written(record.messages[: i + 1], tokenizer, generate=False)
        if not whole.startswith(prompt):
            raise ValueError(
                "the chat template of model.name does not write a conversation as its generation prompt and then "
                f"the answer: set data.prompt to one of {', '.join(PROMPTS)}"
            )
        if not prompt.startswith(done):
            return _one_by_one(record, tokenizer)
        answer, tail, closed = _answer(whole[len(prompt) :], tokenizer)
        segments += [Segment(prompt[len(done) :], learn=False), Segment(answer, True, end=closed)]
        done = whole.removesuffix(tail)
    # A template that ends a turn with another token still has to end the sequence.
    segments[-1] = replace(segments[-1], end=True)
    return [Rendering(tuple(segments), record)]


def _one_by_one(record: Record, tokenizer: ChatTemplate) -> list[Rendering]:
    sequences = []
    for i, message in enumerate(record.messages):
        if message.role == "assistant":
            part = replace(record, messages=record.messages[: i + 1])
            if i + 1 < len(record.messages):
                part = replace(part, answer=message.content)
            prompt = _written(part.messages[:-1], tokenizer, generate=True)
            whole = _written(part.messages, tokenizer, generate=False)
            answer, _, _ = _answer(whole[len(prompt) :], tokenizer)
            pair = (Segment(prompt, learn=False), Segment(answer, learn=True, end=True))
            sequences.append(Rendering(pair, part))
    return sequences


def _answer(text: str, tokenizer: ChatTemplate) -> tuple[str, str, bool]:
    """Return (answer, what the template writes behind its end token, whether it writes that token)."""
    answer, eos, tail = text.partition(tokenizer.eos_token or "\0")
    if eos:
        return answer, tail, True
    return text.rstrip(), text[len(text.rstrip()) :], False


def _written(messages: Sequence[Message], tokenizer: ChatTemplate, *, generate: bool) -> str:
    from jinja2 import TemplateError  # only a failing template needs it

    chat = [{"role": message.role, "content": message.content} for message in messages]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generate)
    except TemplateError as error:
        roles = ", ".join(message.role for message in messages)
        raise ValueError(
            f"the chat template of model.name refuses the roles {roles} ({error}): set data.system to null, or "
            f"data.prompt to one of {', '.join(PROMPTS)}"
        ) from error
    return str(text)


def _own(texts: Mapping[str, str]) -> Turns:
    wrong = sorted(texts.keys() - {"system", "user", "assistant"})
    if wrong or not {"user", "assistant"} <= texts.keys():
        raise ValueError(
            f"data.prompt must map user, assistant and perhaps system to texts, got {', '.join(texts)}"
        )
    for role, text in texts.items():
        if text.count("{content}") != 1:
            raise ValueError(f"data.prompt.{role} must contain {{content}} once, got {text!r}")
    return Turns(user=texts["user"], assistant=texts["assistant"], system=texts.get("system"))


def _without(eos: str, render: Render) -> Render:
    """Take end tokens off the data's answers, so that exactly one follows each."""

    def rendered(record: Record) -> list[Rendering]:
        if not any(message.content.endswith(eos) for message in record.messages):
            return render(record)
        messages = tuple(
            replace(message, content=message.content.removesuffix(eos).rstrip())
            for message in record.messages
        )
        answer = record.answer.removesuffix(eos).rstrip()
        return render(replace(record, messages=messages, answer=answer))

    return rendered


def _filled(text: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), text)
