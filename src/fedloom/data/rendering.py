"""From a record to the sequences that are learnt from it, under the recipe's prompt; and what was done to its text on the way."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from fedloom.data.control import Controls, Hidden, shown
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
    plain_tools: bool = False
    """Whether calls of tools are written as text, and the list of tools left out."""

    @property
    def remarkable(self) -> bool:
        """Return whether it is not simply what the record says."""
        return bool(self.hidden) or self.folded or self.rewritten or self.plain_tools


Write = Callable[[Sequence[Message], str], list[tuple[Segment, ...]]]
"""Of turns, and of the tools that may be called."""
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
    folds: bool = False
    """Whether the template itself puts what the system says into the question."""
    structured: bool = False
    """Whether tools and calls of them are handed to the template, and not written as text."""

    def __call__(self, record: Record) -> list[Rendering]:
        """Return one sequence, or one for each answer that is learnt.

        Raises:
            ValueError: where the prompt cannot write it, with the place of its row.
        """
        # What tools are said to do may read like a control token too.
        listed = Message("system", record.tools if self.structured else "")
        said = record.messages if self.structured else _as_text(record.messages)
        (*messages, listed), hidden = self.controls.hide((*said, listed))
        try:
            sequences, folded = self._sequences(messages, listed.content)
        except ValueError as error:
            where = f"{record.place}: " if record.place else ""
            raise ValueError(f"{where}{error}") from error
        if len(sequences) == 1:
            parts = [record]
        else:
            parts = [_alone(up_to_answer(record, at + 1)) for at in range(len(sequences))]
        rewritten = self.from_template and not _is_whole(messages, sequences)
        uses = bool(record.tools) or any(message.use is not None for message in record.messages)
        return [
            Rendering(
                segments,
                self._answered(part, segments, hidden),
                hidden,
                folded,
                rewritten,
                plain_tools=uses and not self.structured,
            )
            for segments, part in zip(sequences, parts, strict=True)
        ]

    def _answered(self, record: Record, segments: Sequence[Segment], hidden: Hidden) -> Record:
        """Return a record whose answer is as the template writes it, where that is a call."""
        use = record.messages[-1].use
        if not self.structured or use is None:
            return record
        answer = shown(segments[-1].text, hidden)
        for end in sorted(self.ends, key=len, reverse=True):
            answer = answer.strip().removesuffix(end)
        return replace(record, answer=answer.strip())

    def _sequences(
        self, messages: Sequence[Message], tools: str
    ) -> tuple[list[tuple[Segment, ...]], bool]:
        """Return what is written, and whether the system's part was folded."""
        systems = any(message.role == "system" for message in messages)
        try:
            return self.write(messages, tools), systems and self.folds
        except ValueError:
            if not (self.fold and systems):
                raise
        return self.write(_folded(messages), tools), True


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
    write, written, folds = _writer(prompt, tokenizer)
    controls = Controls.of(tokenizer, written)
    ends = tuple({eos, *(text for text in controls.texts if text in written)})
    return Renderer(
        write,
        controls,
        ends,
        fold=settings.system_role == "fold",
        from_template=prompt == "chat",
        prompt=_in_words(prompt, asked=settings.prompt),
        folds=folds,
        structured=prompt == "chat" and settings.tool_calls == "template",
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


def _writer(prompt: str | Mapping[str, str], tokenizer: ChatTemplate) -> tuple[Write, str, bool]:
    """Return what writes a conversation, the text it writes itself, and whether it folds what the system says."""
    if prompt != "chat":
        turns = PROMPTS[prompt] if isinstance(prompt, str) else own_prompt(prompt)
        written = "\0".join((turns.user, turns.assistant, turns.system or ""))
        return (lambda messages, _: [turns(messages)]), written, False
    if not tokenizer.chat_template:
        raise ValueError(
            "data.prompt is chat, but the tokenizer of model.name has no chat template: "
            f"set data.prompt to one of {', '.join(PROMPTS)}"
        )
    template = TemplateWriter(tokenizer)
    return template, template.sample(), template.folds_systems()


def _as_text(messages: Sequence[Message]) -> tuple[Message, ...]:
    return tuple(replace(message, use=None) for message in messages)


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
        if waiting and not message.asks:
            _add_(folded, waiting)
            waiting = ""
        folded.append(replace(message, content=_lines(waiting, message.content)))
        waiting = ""
    if waiting:
        _add_(folded, waiting)
    return folded


def _add_(folded: list[Message], line: str) -> None:
    last = max(at for at, message in enumerate(folded) if message.asks)
    folded[last] = replace(folded[last], content=_lines(folded[last].content, line), context="")


def _lines(*texts: str) -> str:
    return "\n\n".join(text for text in texts if text)


def _is_whole(messages: Sequence[Message], sequences: Sequence[Sequence[Segment]]) -> bool:
    learnt = [m for m in messages if m.role == "assistant" and m.learn]
    texts = [one.text for segments in sequences for one in segments if one.learn]
    # Calls are looked for as they are written.
    said = [message.content if message.use is None else message.use.said for message in learnt]
    return all(holds(text, answer) for answer, text in zip(said, texts, strict=True))


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
            f"{_num_rows(hidden)} conversations hold the text of control tokens ({', '.join(texts[:_NAMED])}{more}), "
            "taken as text"
        )
    if folded := [one for one in renderings if one.folded]:
        lines.append(
            f"{_num_rows(folded)} conversations whose system message stands in the question: "
            "the prompt has no place of its own for it"
        )
    if plain := [one for one in renderings if one.plain_tools]:
        lines.append(
            f"{_num_rows(plain)} conversations with tools, as text: calls are JSON in answers, what they gave back stands in questions,"
            " and no list of tools is shown"
        )
    if rewritten := [one for one in renderings if one.rewritten]:
        first = rewritten[0].record.place or "an unnamed row"
        lines.append(
            f"{_num_rows(rewritten)} conversations whose answers the chat template of model.name writes otherwise than "
            f"the data, the first at {first}"
        )
    return tuple(lines)


def _num_rows(renderings: Sequence[Rendering]) -> str:
    """Return of how many rows they are: two of a row are the answers of a pair."""
    return f"{len({one.record.place or id(one) for one in renderings}):,}"
