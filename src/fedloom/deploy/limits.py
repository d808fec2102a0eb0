"""What a site allows, whatever the server asks for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

# The process that joins holds limits and no torch: what checks recipes and uploads is loaded where that is done.
if TYPE_CHECKING:
    from fedloom.core.protocols import Payload, Reply
    from fedloom.rounds.recipe_settings import Recipe

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The options of `fedloom join`; a site starts with them, and no message changes them."""

    max_message_mb: float = 4096.0
    """Largest message that is taken or sent, in MiB."""
    algorithms: Sequence[str] = ()
    """Names a recipe's algorithm may be made of; empty: all that are installed."""
    spaces: Sequence[str] = ()
    """What `tune` may be, such as lora; empty: any of its kinds."""
    columns: Sequence[str] = ()
    """Columns of the file that are read; empty: all."""
    min_examples: int = 20
    """Examples, of all splits together, without which the site takes no part: the fewer, the more an answer tells of each."""
    clip: float | None = None
    """Largest joint norm of an upload; a larger one is scaled down to it."""
    allow: Sequence[str] = ()
    """Modules outside of fedloom (all that lies below them too), or classes (`module:Class`), that a recipe may name."""
    min_cohort: int = 0
    """Fewest clients, itself counted, that this site's uploads are added up with before anybody reads them; 0: also none."""

    def __post_init__(self) -> None:
        """Refuse what allows nothing."""
        if not self.max_message_mb > 0:
            raise ValueError(f"--max-message-mb must be positive, got {self.max_message_mb}")
        if self.min_examples < 0:
            raise ValueError(f"--min-examples must be at least 0, got {self.min_examples}")
        if self.min_cohort < 0 or self.min_cohort == 1:
            raise ValueError(f"--min-cohort must be 0 or at least 2, got {self.min_cohort}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"--clip must be positive, got {self.clip}")

    def check_recipe(self, recipe: "Recipe") -> None:
        """Refuse a recipe that asks for more than this site allows.

        Raises:
            ValueError: naming the option that would allow it.
        """
        from fedloom.recipe_text import to_tree

        tree = to_tree(recipe)
        for layer in tree["algorithm"]:
            (name,) = layer
            if self.algorithms and name not in self.algorithms:
                raise ValueError(
                    f"this site allows --algorithms {','.join(self.algorithms)}, the recipe asks for {name}"
                )
        (kind,) = tree["tune"]
        if self.spaces and kind not in self.spaces:
            raise ValueError(
                f"this site allows --spaces {','.join(self.spaces)}, the recipe tunes {kind}"
            )
        least = recipe.secure.threshold if recipe.secure is not None else 1
        if self.min_cohort and least < self.min_cohort:
            raise ValueError(
                f"this site's uploads are read only in sums of at least --min-cohort {self.min_cohort}, the recipe has"
                f" {'secure.threshold ' + str(least) if recipe.secure else 'no section secure'}"
            )
        if recipe.model.trust_remote_code:
            raise ValueError("this site runs no code of a model: set model.trust_remote_code false")

    def check_size(self, size: int, what: str) -> None:
        """Refuse a message of too many bytes.

        Raises:
            ValueError: with its size.
        """
        if size > self.max_message_mb * MIB:
            raise ValueError(
                f"{what} has {size / MIB:.1f} MiB, this site allows --max-message-mb {self.max_message_mb:g}"
            )

    def check_examples(self, number: int) -> None:
        """Refuse to take part with few examples, each of which would show the more.

        Raises:
            ValueError: with the number that is asked for.
        """
        if number < self.min_examples:
            raise ValueError(
                f"this site takes no part with fewer than --min-examples {self.min_examples}"
            )

    def check_upload(self, upload: "Payload") -> None:
        """Refuse uploads that a clip cannot bound.

        Raises:
            ValueError: naming the tensor that is not of floating-point numbers.
        """
        for group, params in upload.items():
            for name, tensor in params.items():
                if self.clip is not None and not tensor.is_floating_point():
                    kind = str(tensor.dtype).removeprefix("torch.")
                    raise ValueError(
                        f"this site keeps --clip {self.clip:g}, but {group}/{name} of an upload is {kind}, which"
                        " cannot be scaled: leave --clip out, or take no part in this recipe"
                    )

    def bounded(self, reply: "Reply") -> "Reply":
        """Return the reply with its upload at most `clip` long."""
        if self.clip is None:
            return reply
        from fedloom.privacy.clipping import clipped

        return replace(reply, upload=clipped(reply.upload, self.clip)[0])
