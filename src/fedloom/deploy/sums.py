"""A site in secure sums: its key, the others' public ones, and the upload that it masks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from fedloom.core.files import write_atomic
from fedloom.core.protocols import ClientError, Reply, Task
from fedloom.engines.codec import MessageCodec
from fedloom.engines.introductions import plain
from fedloom.engines.parcels import Piece
from fedloom.engines.sums import shares_of, words_of
from fedloom.rounds.recipe_settings import Recipe
from fedloom.secure.ciphers import Directory, Signer
from fedloom.secure.client import Party
from fedloom.secure.fixed_point import Words
from fedloom.secure.messages import Step
from fedloom.secure.terms import Terms, hash_of


@dataclass(frozen=True)
class NoisySums:
    """How many sums a site gave an upload to with its share of the noise, on its own disk: no server gets more than is accounted for."""

    file: Path
    most: int

    def charge(self) -> None:
        """Count one more; on the disk when this returns.

        Raises:
            ClientError: where that were too many, or nobody knows how many there were.
        """
        try:
            count = int(self.file.read_text()) if self.file.exists() else 0
        except ValueError as error:
            raise ClientError(
                f"{self.file} says in how many noisy sums this site took part, and cannot be read: put it back"
            ) from error
        if count >= self.most:
            raise ClientError(
                f"this site has added its noise to {count} sums, which is all that the recipe accounts for (private.rounds, or"
                " run.rounds): one more would tell more of its data than was promised"
            )
        write_atomic(self.file, f"{count + 1}\n".encode(), private=self.file.parent)


@dataclass
class Member:
    """One site, under one recipe."""

    recipe: Recipe
    party: Party
    noisy: "NoisySums | None" = None
    """Where the site adds noise of its own."""

    def answer(self, header: Mapping[str, Any], data: Piece, say: Callable[[str], None]) -> bytes:
        """Return the answer to a step that asks for no upload.

        Raises:
            ClientError: where no honest server asks so.
            ValueError: where there is no such step.
        """
        step = _step(header)
        answer = self._answer(step, data)
        if step == "share":
            say(f"agreed on masks with {', '.join(self.party.others)}")
        return answer

    def upload(self, data: Piece, task: Task, body: Piece, trained: Callable[[], Reply]) -> bytes:
        """Return a masked upload.

        Args:
            data: The message that asks for it.
            task: What was asked for.
            body: Its download, as it came.
            trained: Does the task; not called where the upload was given before.

        Raises:
            ClientError: where the task is not the one that the keys are bound to, or could not be done.
        """
        recipe = self.recipe
        assert recipe.secure is not None
        secure = recipe.secure

        def vector(terms: Terms) -> Words:
            if (terms.task, terms.round) != (hash_of(body), task.round):
                raise ClientError("the task is not the one that the keys of this sum are bound to")
            codec = MessageCodec(recipe.algorithm, recipe.wire, recipe.metrics)
            words = words_of(codec, task, trained(), secure, terms.heaviest)
            if isinstance(words, str):
                raise ClientError(words)
            if self.noisy is not None:
                self.noisy.charge()
            return words

        return self._answer("upload", data, vector)

    def _answer(
        self, step: Step, data: Piece, vector: Callable[[Terms], Words] | None = None
    ) -> bytes:
        try:
            return self.party.answer(step, data, vector)
        except ClientError as refusal:
            # Names in it are the server's words.
            raise ClientError(plain(refusal)) from refusal


def member_of(
    name: str, keys: Path | None, recipe: Recipe, run: str, least: int, *, folder: Path
) -> Member:
    """Return a site in secure sums.

    Args:
        name: The site's.
        keys: The folder that `fedloom keys add` made for it.
        recipe: That it takes part in.
        run: The recipe's hash.
        least: Fewest clients that it is summed with, itself counted.
        folder: The site's own.

    Raises:
        ValueError: where the recipe has no such sums, or the site not the keys for them.
    """
    if recipe.secure is None or keys is None:
        raise ValueError("the server asks for a secure sum, of which the recipe has none")
    public = {path.stem: path.read_bytes() for path in sorted((keys / "peers").glob("*.pub"))}
    if name not in public:
        raise ValueError(
            f"{keys / 'peers'} does not hold the public keys of those that take part, which secure sums are signed by: copy"
            " the site's folder from the server's keys again"
        )
    signer = Signer.read((keys / "node.key").read_bytes())
    party = Party(name, recipe.secure, signer, Directory(public), run, least)
    shares = shares_of(recipe.algorithm)
    counted = NoisySums(folder / "noisy_sums" / name / run, shares.num_sums) if shares else None
    return Member(recipe, party, counted)


def _step(header: Mapping[str, Any]) -> Step:
    """Return the step that is asked for by itself."""
    for step in get_args(Step):
        if header.get("step") == step != "upload":
            found: Step = step
            return found
    raise ValueError(f"a secure sum has no step {ascii(header.get('step'))[:40]}")
