"""Conversations as a tokenizer's own chat template writes them, cut where generation would begin and end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from fedloom.data import tools as of_tools
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
        self,
        conversation: list[dict[str, object]],
        *,
        tools: list[dict[str, object]] | None = None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> object:
        """Return the text of the conversation, with the functions that may be called."""
        ...


@dataclass(frozen=True, slots=True)
class TemplateWriter:
    """The chat template of a tokenizer."""

    tokenizer: ChatTemplate

    def __call__(self, messages: Sequence[Message], tools: str = "") -> list[tuple[Segment, ...]]:
        """Return the sequence of the conversation, or one for each answer that is learnt.

        Args:
            messages: Its turns.
            tools: The functions that may be called, see `tools.read_tools`.

        A template that rewrites earlier turns once later ones follow (it drops their reasoning) cannot show every
        answer as it was generated in one sequence: each answer then gets a sequence of its own.
        """
        segments: list[Segment] = []
        done = ""
        generated = self._generated(messages, tools)
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
                texts.append(self._written(messages, "", generate=False))
            except ValueError:
                continue
        return "\0".join(texts)

    def folds_systems(self) -> bool:
        """Return whether the template itself puts what the system says at the head of the question (Gemma)."""
        system, asked = Message("system", "Say s."), Message("user", "Say u.")
        folded = replace(asked, content=f"{system.content}\n\n{asked.content}")
        try:
            apart = self._written([system, asked], "", generate=False)
            one = self._written([folded], "", generate=False)
        except ValueError:
            return False
        return apart.split() == one.split()

    def _one_by_one(self, generated: Sequence[tuple[str, str]]) -> list[tuple[Segment, ...]]:
        return [
            (Segment(prompt, learn=False), Segment(self._answer(full)[0], learn=True, end=True))
            for prompt, full in generated
        ]

    def _generated(self, messages: Sequence[Message], tools: str) -> list[tuple[str, str]]:
        """Return, of every answer that is learnt, the text before it and what the template writes from there on."""
        pairs = []
        for at, message in enumerate(messages):
            if message.role != "assistant" or not message.learn:
                continue
            prompt = self._written(messages[:at], tools, generate=True)
            _check_systems(messages[:at], prompt)
            whole = self._written(messages[: at + 1], tools, generate=False)
            if not whole.startswith(prompt):
                raise ValueError(
                    "the chat template of model.name does not write a conversation as its generation prompt and "
                    f"then the answer: set data.prompt to one of {', '.join(PROMPTS)}"
                )
            pairs.append((prompt, whole[len(prompt) :]))
            _check_tools(messages[: at + 1], tools, *pairs[-1])
        return pairs

    def _answer(self, text: str) -> tuple[str, str, bool]:
        """Return (answer, what the template writes behind its end token, whether it writes that token)."""
        answer, eos, tail = text.partition(self.tokenizer.eos_token or "\0")
        if eos:
            return answer, tail, True
        return text.rstrip(), text[len(text.rstrip()) :], False

    def _written(self, messages: Sequence[Message], tools: str, *, generate: bool) -> str:
        from jinja2 import TemplateError  # only a failing template needs it

        try:
            try:
                return self._applied(_turns(messages), tools, generate=generate)
            except TypeError:
                # Some templates join the arguments of calls to their own text.
                return self._applied(_turns(messages, as_text=True), tools, generate=generate)
        except (TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ValueError(_refusal(messages, tools, str(error))) from error

    def _applied(self, chat: list[dict[str, object]], tools: str, *, generate: bool) -> str:
        write = self.tokenizer.apply_chat_template
        if not tools:
            return str(write(chat, tokenize=False, add_generation_prompt=generate))
        listed = of_tools.listed(tools)
        return str(write(chat, tools=listed, tokenize=False, add_generation_prompt=generate))


def _turns(messages: Sequence[Message], *, as_text: bool = False) -> list[dict[str, object]]:
    """Return the turns as templates take them; what several calls gave back is a turn each."""
    chat: list[dict[str, object]] = []
    called: Sequence[of_tools.Call] = ()
    number = 0
    for message in messages:
        use = message.use
        if use is None:
            chat.append({"role": message.role, "content": message.content})
        elif use.calls:
            number, called = number + len(called), use.calls
            chat.append(of_tools.calling(use, number, as_text=as_text))
        else:
            chat += of_tools.answering(use, called, number)
    return chat


def holds(text: str, part: str) -> bool:
    """Return whether `said` stands in `text`, white space aside."""
    return part in text or "".join(part.split()) in "".join(text.split())


def _check_systems(messages: Sequence[Message], written: str) -> None:
    """Refuse a template that passes over what the system says."""
    systems = [message.content for message in messages if message.role == "system"]
    if not all(holds(written, system) for system in systems):
        raise ValueError(_refusal(messages, "", "it leaves what the system says out"))


def _check_tools(messages: Sequence[Message], tools: str, prompt: str, answer: str) -> None:
    """Refuse a template that passes over tools, calls of them or what these gave back."""
    *before, last = messages
    missing = [name for name in of_tools.names(tools) if name not in prompt]
    calls = last.use.calls if last.use is not None else ()
    results = [one for message in before if message.use is not None for one in message.use.results]
    if missing:
        reason = f"it leaves the tool {missing[0]} out"
    elif unwritten := [call.name for call in calls if not of_tools.is_called(call, answer)]:
        reason = f"it leaves the call of {unwritten[0]} out"
    elif printed := [call.name for call in calls if of_tools.is_printed_in(call, answer)]:
        reason = f"it writes the arguments of {printed[0]} as Python prints them"
    elif not all(of_tools.is_told(result, prompt) for result in results):
        reason = "it leaves out what a tool gave back"
    else:
        return
    raise ValueError(_refusal(messages, tools, reason))


def _refusal(messages: Sequence[Message], tools: str, reason: str) -> str:
    if tools or any(message.use is not None for message in messages):
        return (
            f"the chat template of model.name cannot write a conversation with tools ({reason}): set data.tool_calls to"
            " text, which writes calls as JSON in answers and what they gave back as questions"
        )
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
