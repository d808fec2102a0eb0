"""What is known of inputs that are elsewhere, or that another process is at work on."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedloom import experiment
from fedloom.data.manifest import ClientCounts
from fedloom.reopen import recipe_of
from fedloom.rounds.binding import changed_sites, identity_of
from fedloom.rounds.lock import InUse, held
from fedloom.rounds.recipe_settings import Recipe
from fedloom.rounds.restore import last_run
from fedloom.rounds.session import Session, build

Make = Callable[..., Recipe]


def of_sites(session: Session, **rows: int) -> Session:
    clients = {name: ClientCounts(n, 0, 1, n, 9, 9, {}) for name, n in rows.items()}
    manifest = replace(
        session.federation.manifest, clients=clients, profiles={name: {} for name in rows}
    )
    return replace(session, federation=replace(session.federation, manifest=manifest))


def test_a_site_with_other_counts_is_told_and_a_new_one_is_not(
    small_recipe: Make, tmp_path: Path
) -> None:
    session = build(small_recipe(engine={"flower": {"nodes": 0}}), tmp_path)
    assert "data" not in identity_of(session)
    assert changed_sites(of_sites(session, alba=4)) == ()
    known = of_sites(session, alba=4, bern=5).federation.manifest.to_json()
    (tmp_path / "manifest.json").write_text(json.dumps(known))
    assert changed_sites(of_sites(session, alba=4, bern=5, chur=6)) == ()
    (found,) = changed_sites(of_sites(session, alba=4, bern=7))
    assert str(found) == "examples of bern, 5/0/1 then and 7/0/1 now"


def test_a_folder_in_use_is_left_alone_and_can_be_read(small_recipe: Make, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe = small_recipe(run={"rounds": 1, "samples": 0}, evaluation={"generate": False})
    experiment.run(recipe, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with held(folder):
        with pytest.raises(InUse, match="is in use by process"):
            experiment.run(recipe, folder)
        assert last_run(build(recipe_of(folder), folder, data=False)).number == 1
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_checkpoint_that_is_being_written_is_not_cleared_away_by_a_reader(
    small_recipe: Make, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    recipe = small_recipe(run={"rounds": 1, "samples": 0}, evaluation={"generate": False})
    experiment.run(recipe, folder)
    half = folder / "checkpoints" / "round-000002.ckpt.part"
    half.write_bytes(b"half")
    session = build(recipe, folder, data=False)
    assert last_run(session).number == 1
    assert half.exists()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="holds no checkpoint to resume from: put it back"):
        last_run(session)
