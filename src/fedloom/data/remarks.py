"""What was done to the text of the data on the way to tokens, in sentences for the preview and the run."""

from collections.abc import Sequence

from fedloom.data.rendering import Rendering

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
