"""Prompts written role by role: from a conversation to stretches of text, each learnt or not."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedloom.data.formats import Message


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of the text of a conversation."""

    text: str
    learn: bool
    """Whether its tokens are targets."""
    end: bool = False
    """Whether the end-of-sequence token follows it, learnt as it is."""


@dataclass(frozen=True, slots=True)
class RolePrompt:
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

    def __call__(self, messages: Sequence[Message]) -> tuple[Segment, ...]:
        """Return the one sequence of the conversation."""
        segments: list[Segment] = []
        pending = self._opening(messages)
        before, _, after = self.assistant.partition("{content}")
        # A space before the answer belongs to its first token in most vocabularies.
        bare = before.rstrip(" ")
        for message in messages:
            if message.role == "system":
                pending += _filled(self.system or "", {"content": message.content})
            elif message.role == "user":
                pending += self._content(message)
            else:
                segments.append(Segment(pending + bare, learn=False))
                answer = before[len(bare) :] + message.content + after.rstrip()
                segments.append(Segment(answer, learn=message.learn, end=True))
                pending = after[len(after.rstrip()) :]
        return tuple(segments)

    def _opening(self, messages: Sequence[Message]) -> str:
        if any(message.role == "system" for message in messages):
            if self.system is None:
                raise ValueError(
                    "data.prompt needs a text for the role system, got only user and assistant; "
                    "data.system_role fold puts it in front of the question"
                )
            return ""
        first = next(message for message in messages if message.role == "user")
        return (first.context and self.default_system_with_context) or self.default_system

    def _content(self, message: Message) -> str:
        if not (message.context and self.user_with_context):
            return _filled(self.user, {"content": message.content})
        instruction = message.content.removesuffix(message.context).rstrip()
        parts = {"instruction": instruction, "context": message.context}
        return _filled(self.user_with_context, parts)


PROMPTS: dict[str, RolePrompt] = {
    # Taori et al., Stanford Alpaca, with and without input.
    "alpaca": RolePrompt(
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
    "vicuna": RolePrompt(
        system="{content} ",
        user="USER: {content} ",
        assistant="ASSISTANT: {content}",
        default_system="A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. ",
    ),
    "plain": RolePrompt(system="{content}\n\n", user="{content}\n", assistant="{content}\n"),
}


def own_prompt(texts: Mapping[str, str]) -> RolePrompt:
    """Return the prompt of a recipe's own.

    Raises:
        ValueError: where a role is missing or unknown, or its text has no place for what is said.
    """
    wrong = sorted(texts.keys() - {"system", "user", "assistant"})
    if wrong or not {"user", "assistant"} <= texts.keys():
        raise ValueError(
            f"data.prompt must map user, assistant and perhaps system to texts, got {', '.join(texts)}"
        )
    for role, text in texts.items():
        if text.count("{content}") != 1:
            raise ValueError(f"data.prompt.{role} must contain {{content}} once, got {text!r}")
    return RolePrompt(user=texts["user"], assistant=texts["assistant"], system=texts.get("system"))


def _filled(text: str, parts: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda match: parts.get(match[1], match[0]), text)
