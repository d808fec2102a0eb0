"""From a record to the sequences that are learnt from it, under the recipe's prompt; and what was done to its text on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.data.control import Controls, Hidden
from fedloom.data.data_settings import DataSettings
from fedloom.data.formats import Message, Record
from fedloom.data.prompts import PROMPTS, Segment, own_prompt
from fedloom.data.targets import up_to_answer
from fedloom.data.templates import ChatTemplate, TemplateWriter, holds


@dataclass(frozen=True, slots=True)
class Rendering:
    """One sequence to learn from; its last learnt segment answers `record`."""

    segments: tuple[Segment, ...]
    record: Record
    hidden: Hidden = field(default_factory=dict)
    """What characters in the segments stand for texts that read like control tokens."""
    folded: bool = False
    """Whether what the system says stands in a question."""
    rewritten: bool = False
    """Whether an answer is not what the record says: the template left a part of it out."""

    @property
    def remarkable(self) -> bool:
        """Return whether it is not simply what the record says."""
        return bool(self.hidden) or self.folded or self.rewritten


Write = Callable[[Sequence[Message]], list[tuple[Segment, ...]]]
Render = Callable[[Record], list[Rendering]]


@dataclass(frozen=True, slots=True)
class Renderer:
    """How conversations are written under `data.prompt`."""

    write: Write
    controls: Controls
    ends: tuple[str, ...]
    """Texts that may end an answer: of the end-of-sequence token, and of those the prompt writes."""
    fold: bool
    """Whether a system message goes into the question where the prompt has no place for it."""
    from_template: bool
    """Whether a chat template writes them, which may leave parts out and writes its own begin token."""
    prompt: str
    """Which prompt it is, in words."""

    def __call__(self, record: Record) -> list[Rendering]:
        """Return one sequence, or one for each answer that is learnt.

        Raises:
            ValueError: where the prompt cannot write it, with the place of its row.
        """
        messages, hidden = self.controls.hide(record.messages)
        try:
            sequences, folded = self._sequences(messages)
        except ValueError as error:
            where = f"{record.place}: " if record.place else ""
            raise ValueError(f"{where}{error}") from error
        if len(sequences) == 1:
            parts = [record]
        else:
            parts = [_alone(up_to_answer(record, at + 1)) for at in range(len(sequences))]
        rewritten = self.from_template and not _is_whole(messages, sequences)
        return [
            Rendering(segments, part, hidden, folded, rewritten)
            for segments, part in zip(sequences, parts, strict=True)
        ]

    def _sequences(self, messages: Sequence[Message]) -> tuple[list[tuple[Segment, ...]], bool]:
        """Return what is written, and whether the system's part was folded."""
        try:
            return self.write(messages), False
        except ValueError:
            if not (self.fold and any(message.role == "system" for message in messages)):
                raise
        return self.write(_folded(messages)), True


def make_render(settings: DataSettings, tokenizer: ChatTemplate) -> Renderer:
    """Return how conversations are written under `data.prompt`.

    Raises:
        ValueError: where the tokenizer lacks what that needs, or the prompt is not one.
    """
    eos = tokenizer.eos_token
    if not eos:
        raise ValueError(
            "the tokenizer of model.name has no end-of-sequence token, so no answer could end"
        )
    prompt = resolved_prompt(settings, tokenizer)
    write, written = _writer(prompt, tokenizer)
    controls = Controls.of(tokenizer, written)
    ends = tuple({eos, *(text for text in controls.texts if text in written)})
    return Renderer(
        write,
        controls,
        ends,
        fold=settings.system_role == "fold",
        from_template=prompt == "chat",
        prompt=_in_words(prompt, asked=settings.prompt),
    )


def resolved_prompt(settings: DataSettings, tokenizer: ChatTemplate) -> str | Mapping[str, str]:
    """Return `data.prompt`; of `auto`, what it comes to with this tokenizer."""
    if settings.prompt != "auto":
        return settings.prompt
    # A template that is there and fails is an error as under `chat`.
    return "chat" if tokenizer.chat_template else "plain"


def _in_words(prompt: str | Mapping[str, str], *, asked: str | Mapping[str, str]) -> str:
    if not isinstance(prompt, str):
        return "texts of the recipe's own"
    if prompt == "chat":
        return "chat template of the tokenizer"
    return f"{prompt}: the tokenizer has no chat template" if asked == "auto" else prompt


def _writer(prompt: str | Mapping[str, str], tokenizer: ChatTemplate) -> tuple[Write, str]:
    """Return what writes a conversation, and the text it writes itself."""
    if prompt != "chat":
        turns = PROMPTS[prompt] if isinstance(prompt, str) else own_prompt(prompt)
        written = "\0".join((turns.user, turns.assistant, turns.system or ""))
        return (lambda messages: [turns(messages)]), written
    if not tokenizer.chat_template:
        raise ValueError(
            "data.prompt is chat, but the tokenizer of model.name has no chat template: "
            f"set data.prompt to one of {', '.join(PROMPTS)}"
        )
    template = TemplateWriter(tokenizer)
    return template, template.sample()


def _alone(record: Record) -> Record:
    """Return the record with its last answer as the only one that is learnt."""
    before = tuple(replace(message, learn=False) for message in record.messages[:-1])
    return replace(record, messages=(*before, record.messages[-1]))


def _folded(messages: Sequence[Message]) -> list[Message]:
    """Put what the system says in front of the next question, or behind the one it comes after."""
    folded: list[Message] = []
    waiting = ""
    for message in messages:
        if message.role == "system":
            waiting = _lines(waiting, message.content)
            continue
        if waiting and message.role != "user":
            _add_(folded, waiting)
            waiting = ""
        folded.append(replace(message, content=_lines(waiting, message.content)))
        waiting = ""
    if waiting:
        _add_(folded, waiting)
    return folded


def _add_(folded: list[Message], line: str) -> None:
    last = max(at for at, message in enumerate(folded) if message.role == "user")
    folded[last] = replace(folded[last], content=_lines(folded[last].content, line), context="")


def _lines(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _is_whole(messages: Sequence[Message], sequences: Sequence[Sequence[Segment]]) -> bool:
    learnt = [m.content for m in messages if m.role == "assistant" and m.learn]
    texts = [one.text for segments in sequences for one in segments if one.learn]
    return all(holds(text, answer) for answer, text in zip(learnt, texts, strict=True))


_NAMED = 4


def remarks(renderings: Sequence[Rendering], ends: Sequence[str]) -> tuple[str, ...]:
    """Return a line for each kind of change.

    Args:
        renderings: One a conversation; others than remarkable ones say nothing.
        ends: Texts of end tokens that were taken off all answers.
    """
    lines = [
        f"the text {end} ends every answer and was taken off: the end token itself follows each"
        for end in ends
    ]
    hidden = [one for one in renderings if one.hidden]
    if hidden:
        texts = sorted({text for one in hidden for text in one.hidden.values()})
        more = f" and {len(texts) - _NAMED} more" if len(texts) > _NAMED else ""
        lines.append(
            f"{len(hidden):,} conversations hold the text of control tokens ({', '.join(texts[:_NAMED])}{more}), "
            "taken as text"
        )
    if folded := sum(one.folded for one in renderings):
        lines.append(
            f"{folded:,} conversations whose system message stands in the question: "
            "the prompt has no place of its own for it"
        )
    rewritten = [one.record for one in renderings if one.rewritten]
    if rewritten:
        lines.append(
            f"{len(rewritten):,} conversations whose answers the chat template of model.name writes otherwise than "
            f"the data, the first at {rewritten[0].place or 'an unnamed row'}"
        )
    return tuple(lines)
