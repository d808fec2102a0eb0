"""A server that is killed and goes on with sites that stayed: the bytes of one process, without a network between them."""

from pathlib import Path
from typing import Any

import pytest
from tests.deploy.conftest import KINDS, SITES, in_one_process, write_pairs
from tests.deploy.test_handover import Wires

from fedloom.deploy.greeting import EMULATOR, greeting, shared_recipe
from fedloom.deploy.handover import handed_over
from fedloom.deploy.limits import Limits
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.parcels import Parcel
from fedloom.engines.remote import Remote
from fedloom.engines.requests import Requests
from fedloom.recipe import build_recipe
from fedloom.rounds.checkpoint import Checkpoints, state_sha256
from fedloom.rounds.emulation import AlignmentStage, stage_of
from fedloom.rounds.loop import advance, begin
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.session import Session, build
from fedloom.spaces.offsite import OffsiteSpace


def server_of(recipe: Recipe, folder: Path, wires: Wires) -> tuple[Session, Remote]:
    """Return a server that has met its sites."""
    server, files = build(recipe, folder), dict[str, Parcel]()
    if isinstance(server.space, OffsiteSpace):
        server.space.save_emulator(folder / EMULATOR)
        files = handed_over(folder / EMULATOR)
    head = greeting(shared_recipe(recipe), server)
    requests = Requests(wires, on_trouble=lambda _: None)
    remote = Remote(
        recipe.algorithm, recipe.wire, requests, head, 60.0, one_client=True, files=files
    )
    remote.meet(SITES, seconds=60)
    return server, remote


def played(recipe: Recipe, remote: Remote, stage: AlignmentStage | None, run: Any) -> Any:
    """Return the run after one more round, and what its server does then."""
    run, _, failures = advance(
        run, recipe.algorithm, remote, population=remote.population(), sampler=recipe.cohort
    )
    assert not failures
    return stage.after(run)[0] if stage else run


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_was_killed_goes_on_to_the_bytes_of_one_process(
    kind: str, tree: dict[str, Any], whole: Path, tmp_path: Path
) -> None:
    """It dies when its last round is played, aligned and all, and sites have learnt, but before it is on the disk."""
    base = {**tree, "model": {"name": str(whole)}, **KINDS[kind]}
    alone = build_recipe(base)
    if kind != "fedbiot":
        write_pairs(alone)
    recipe = build_recipe({**base, "engine": {"flower": {"nodes": 0}}})
    sites = {}
    for name in SITES:
        data = Path(recipe.data.source) / f"{name}.jsonl"
        settings = SiteSettings(
            name, tmp_path / "sites" / name, data, limits=Limits(min_examples=4)
        )
        sites[name] = Site(settings)
    wires, checkpoints = Wires(sites), Checkpoints(tmp_path / "checkpoints")
    server, remote = server_of(recipe, tmp_path / "server", wires)
    stage = stage_of(server)
    fresh = begin(recipe.algorithm, server.space.start(), recipe.run.seed)
    run = stage.before(fresh) if stage else fresh
    for _ in range(recipe.run.rounds - 1):
        run = played(recipe, remote, stage, run)
    checkpoints.save(run)
    lost = played(recipe, remote, stage, run)
    server, remote = server_of(recipe, tmp_path / "server", wires)
    resumed = checkpoints.load(begin(recipe.algorithm, server.space.start(), recipe.run.seed)).run
    again = played(recipe, remote, stage_of(server), resumed)
    assert state_sha256(again) == state_sha256(lost) == in_one_process(alone, tmp_path / "here")
