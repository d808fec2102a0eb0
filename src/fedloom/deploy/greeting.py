"""What server and site must agree on before round 1."""

import dataclasses
import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch

from fedloom.algorithms.fedbiot import FedBiOT
from fedloom.core.randomness import generator
from fedloom.recipe_text import to_yaml
from fedloom.rounds.binding import identity_of
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session
from fedloom.server.public import PublicText
from fedloom.spaces.offsite import Offsite
from fedloom.wire.frame import VERSION

EMULATOR = "emulator"
"""What a recipe for sites calls the model where they are handed an emulator of it; the folder that it is in, there and here."""


def shared_recipe(recipe: Recipe) -> str:
    """Return the recipe as sites get it: without what is the server's own affair, or a site's."""
    run = dataclasses.replace(recipe.run, trackers=(), baselines=(), samples=0)
    data = recipe.data
    if recipe.elsewhere:
        data = dataclasses.replace(data, source="site", config=None, split="train", revision=None)
    changed = dataclasses.replace(recipe, run=run, data=data)
    if recipe.elsewhere and isinstance(recipe.tune, Offsite):
        # Neither which model it is nor which text the server has is a site's business.
        model, algorithm = recipe.model, recipe.algorithm
        model = dataclasses.replace(model, name=EMULATOR, file=None, revision=None)
        if isinstance(algorithm, FedBiOT):
            algorithm = dataclasses.replace(algorithm, public=PublicText("server"))
        changed = dataclasses.replace(changed, model=model, algorithm=algorithm)
    return to_yaml(changed)


def greeting(recipe_text: str, session: Session) -> Mapping[str, Any]:
    """Return what a server says first in every envelope: the recipe, and what sites must have in common with it.

    Args:
        recipe_text: As sites get it.
        session: The server's, or a site's.
    """
    identity = {**versions(), "recipe": recipe_sha256(recipe_text), **identity_of(session)}
    # Two versions of transformers may tell the same configuration in other words.
    del identity["config"]
    return {"recipe": recipe_text, "identity": identity}


def versions() -> Mapping[str, str]:
    """Return what can be compared before anything is loaded."""
    return {"fedloom": version("fedloom"), "wire": str(VERSION), "draws": draws_sha256()}


def recipe_sha256(text: str) -> str:
    """Return the hash that both sides compare."""
    return hashlib.sha256(text.encode()).hexdigest()


def draws_sha256() -> str:
    """Return a hash of some random draws: two versions of torch that draw differently must not be mixed."""
    drawn = torch.randn(64, generator=generator(0, "handshake"))
    mixed = torch.randperm(64, generator=generator(1, "handshake"))
    return hashlib.sha256(drawn.numpy().tobytes() + mixed.numpy().tobytes()).hexdigest()
