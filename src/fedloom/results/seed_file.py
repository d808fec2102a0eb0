"""A model in seed space as a file of a few kilobytes, and the whole model made of it again, to the bit.

A seed file holds what is not the base model: which directions, the coefficients along them, and the hash of the weights they
are added to. Layout: a line with kind, version and the SHA-256 of all that follows; a line of JSON; the numbers, deflated.
"""

import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedloom.core.files import folder_at, write_atomic
from fedloom.core.protocols import Params
from fedloom.core.randomness import derive
from fedloom.models.build import ModelSettings, load_base
from fedloom.rounds.session import Session
from fedloom.spaces.handshake import MEANING, differing
from fedloom.spaces.seed_space import Seeds, SeedSpace

SUFFIX = ".seeds"
_KIND, _VERSION = "fedloom-seeds", 1
_DAMAGED = "is damaged: get the file again"


@dataclass(frozen=True)
class SeedFile:
    """What makes a model of its base model."""

    name: str
    """Of the base model, as the run's recipe had it."""
    dtype: str
    """Of its weights: the recipe's model.dtype."""
    quantize: str
    """The recipe's model.quantize."""
    tune: Mapping[str, Any]
    """The recipe's tune.seeds."""
    seed: int
    """Of the space."""
    decays: bool
    """Whether the base model shrinks too."""
    identity: Mapping[str, str]
    """Hash of the base weights, and of whatever else the directions follow from."""
    params: Params
    """Coefficients, float64."""

    @classmethod
    def of(cls, session: Session, params: Params) -> "SeedFile":
        """Return the file of one of a run's models.

        Raises:
            ValueError: where the run is none in seed space.
        """
        recipe, space = session.recipe, session.space
        if not isinstance(space, SeedSpace) or not isinstance(recipe.tune, Seeds):
            raise ValueError(
                f"a seed file is written of runs with tune: seeds, got {recipe.tune.title}: export with --for peft"
            )
        seed = derive(recipe.run.seed, "space")
        return cls(
            recipe.model.name,
            recipe.model.dtype,
            recipe.model.quantize,
            {**asdict(recipe.tune), "weights": list(recipe.tune.weights)},
            seed,
            recipe.local.decays_seeds,
            dict(space.identity()),
            space.read(params),
        )

    def write(self, file: Path) -> None:
        """Write it; numbers in float32 where that is all of them."""
        values = np.concatenate([t.double().numpy().ravel() for t in self.params.values()])
        narrow = values.astype("<f4")
        kept = narrow if (narrow == values).all() else values.astype("<f8")
        head = {
            "model": {"name": self.name, "dtype": self.dtype, "quantize": self.quantize},
            "tune": dict(self.tune),
            "seed": self.seed,
            "decays": self.decays,
            "identity": dict(self.identity),
            "params": {name: list(t.shape) for name, t in self.params.items()},
            "type": kept.dtype.str,
        }
        # Bytes of one place together: seeds that were never drawn, and exponents that are alike, take next to nothing.
        planes = kept.view(np.uint8).reshape(-1, kept.itemsize).T.tobytes()
        body = json.dumps(head).encode() + b"\n" + zlib.compress(planes, 9)
        first = f"{_KIND} {_VERSION} {hashlib.sha256(body).hexdigest()}\n"
        write_atomic(file, first.encode(), body)

    @classmethod
    def read(cls, file: Path) -> "SeedFile":
        """Return what a file holds.

        Raises:
            ValueError: where it is none, is damaged, or is of another version.
        """
        if not file.is_file():
            raise ValueError(
                f"{file} is no file: give a seed file, as `fedloom export --for seeds` writes it"
            )
        first, _, body = file.read_bytes().partition(b"\n")
        words = first[:200].decode("ascii", "replace").split(" ")
        if words[0] != _KIND:
            raise ValueError(
                f"{file} is no seed file: give one that `fedloom export --for seeds` wrote"
            )
        if len(words) != 3 or words[2] != hashlib.sha256(body).hexdigest():
            raise ValueError(f"{file} {_DAMAGED}")
        if words[1] != str(_VERSION):
            raise ValueError(
                f"{file} is of version {words[1]}, and version {_VERSION} is read here: install the fedloom that wrote it"
            )
        line, _, packed = body.partition(b"\n")
        head = json.loads(line)
        kind = np.dtype(head["type"])
        planes = np.frombuffer(zlib.decompress(packed), np.uint8)
        values = planes.reshape(kind.itemsize, -1).T.ravel().view(kind).astype(np.float64)
        sizes = {name: torch.Size(shape) for name, shape in head["params"].items()}
        parts = torch.split(torch.from_numpy(values), [size.numel() for size in sizes.values()])
        params = {n: p.reshape(s) for (n, s), p in zip(sizes.items(), parts, strict=True)}
        return cls(
            **head["model"],
            tune=head["tune"],
            seed=head["seed"],
            decays=head["decays"],
            identity=head["identity"],
            params=params,
        )


def apply_seeds(file: Path, base: str, folder: Path) -> Path:
    """Write the model that a seed file makes of its base model, with the bits of the run's own export; return its folder.

    Args:
        file: As `export` writes it for seeds.
        base: The base model, as a recipe's model.name.
        folder: To write; not there yet, or empty.

    Raises:
        ValueError: where the file is damaged, or the base model is not the one it was made on.
    """
    if folder_at(folder, "--out").is_dir() and any(folder.iterdir()):
        raise ValueError(f"--out must be a folder that is empty or not there yet, got {folder}")
    seeds = SeedFile.read(file)
    settings: Any = {"dtype": seeds.dtype, "quantize": seeds.quantize}
    loaded = load_base(ModelSettings(base, **settings))
    space = Seeds(**seeds.tune).make_space(loaded, seed=seeds.seed, decays=seeds.decays)
    for key in differing(seeds.identity, space.identity()):
        raise ValueError(
            f"{file} was made on another model than {base}: it asks for the {MEANING.get(key, key)} of {seeds.name}"
        )
    space.save_merged(folder, seeds.params)
    return folder
