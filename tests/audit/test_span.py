"""Which words an update reveals: on gradients made by hand, and on whole runs of a tiny model."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fedloom import experiment
from fedloom.audit.conduct import Audit, audit
from fedloom.audit.findings import Finding
from fedloom.audit.learnt import learnt, tokens_of
from fedloom.audit.records import Case, open_case
from fedloom.audit.span import area, distances, found
from fedloom.audit.windows import Part, Window
from fedloom.client.setup import batches
from fedloom.data.tokens import Example
from fedloom.rounds.received import read_round
from fedloom.rounds.recipe_settings import Recipe

VOCABULARY, WIDTH = 512, 128
Make = Callable[..., Recipe]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


WORDS = drawn(VOCABULARY, WIDTH, seed=1)


def batch(count: int, seed: int = 2) -> Tensor:
    return torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(seed))[:count]


def marked(tokens: Tensor) -> Tensor:
    words = torch.zeros(VOCABULARY, dtype=torch.bool)
    words[tokens] = True
    return words


def gradient(tokens: Tensor, rows: int = WIDTH, seed: int = 3) -> Tensor:
    """Return what a linear layer's gradient is: a sum over tokens of something times the layer's input."""
    return drawn(rows, len(tokens), seed=seed) @ WORDS[tokens]


def window(rows: Tensor, words: Tensor = WORDS) -> Window:
    return Window("weights", [Part(rows, words, 1e-5)])


def test_every_word_is_found_while_they_are_fewer_than_the_width_and_nothing_else():
    tokens = batch(12)
    seen = window(gradient(tokens))
    assert found(seen, distances(seen), marked(tokens), 0.05) == (1.0, 1.0)


def test_words_of_a_low_rank_factor_are_found_while_they_are_no_more_than_its_rank():
    for count, expected in ((8, 1.0), (16, 0.0), (32, 0.0)):
        tokens = batch(count)
        seen = window(gradient(tokens, rows=8))
        far = distances(seen)
        assert found(seen, far, marked(tokens), 0.05)[0] == expected
        # What is not found at the threshold still tells.
        near = area(far, marked(tokens), torch.ones(VOCABULARY, dtype=torch.bool))
        assert near is not None
        assert near > 0.7


def test_a_random_gradient_tells_nothing():
    tokens, everyone = marked(batch(64)), torch.ones(VOCABULARY, dtype=torch.bool)
    areas = [
        area(distances(window(drawn(rows, WIDTH, seed=9 + at))), tokens, everyone)
        for at, rows in enumerate((8, 8, 32, 32, 128, 128))
    ]
    assert sum(one or 0.0 for one in areas) / len(areas) == pytest.approx(0.5, abs=0.05)


def test_noise_takes_the_area_to_chance():
    everyone, means = torch.ones(VOCABULARY, dtype=torch.bool), []
    for noise in (0.0, 0.5, 1.0, 8.0):
        areas = []
        for seed in range(3):
            tokens = batch(24, seed=seed)
            clean = gradient(tokens, seed=20 + seed)
            added = drawn(*clean.shape, seed=40 + seed) * clean.norm() / clean.numel() ** 0.5
            areas.append(area(distances(window(clean + noise * added)), marked(tokens), everyone))
        means.append(sum(one or 0.0 for one in areas) / 3)
    assert means == sorted(means, reverse=True)
    assert means[0] == 1.0
    assert means[-1] < 0.75


def test_entries_that_no_row_kept_are_left_out_of_the_comparison():
    tokens = batch(12)
    rows = gradient(tokens)
    rows[:, ::2] = 0
    seen = window(rows)
    assert found(seen, distances(seen), marked(tokens), 0.05) == (1.0, 1.0)


def test_words_that_a_layer_cannot_tell_apart_are_one_finding():
    tokens, words = batch(6), WORDS.clone()
    twins = torch.tensor([at for at in range(VOCABULARY) if at not in tokens])[:40]
    words[twins] = words[tokens[0]].clone()
    seen = window(drawn(WIDTH, 6) @ words[tokens], words)
    assert found(seen, distances(seen), marked(tokens), 0.05) == (1.0, 1.0)


def test_rows_of_words_that_moved_alone_name_them():
    moved = torch.zeros(VOCABULARY)
    moved[batch(5)] = 1.0
    seen = Window("embedding", moved=moved)
    assert found(seen, distances(seen), marked(batch(5)), 0.05) == (1.0, 1.0)


# --- whole runs -----------------------------------------------------------------------------------


def made(make: Make, folder: Path, **sections: Any) -> Path:
    tree: dict[str, Any] = {
        "audit": "record",
        "model": {"name": "builtin:tiny"},
        "data": {"num_examples": 60, "max_length": 96},
        "local": {"steps": 1, "batch_size": 1},
        "evaluation": {"generate": False, "every": 0, "max_examples": 1},
        "run": {"rounds": 2, "samples": 0},
    }
    for name, section in sections.items():
        merge = isinstance(section, dict) and name in tree
        tree[name] = {**tree[name], **section} if merge else section
    experiment.run(make(**tree), folder)
    return folder


@pytest.fixture
def trained_on(monkeypatch: pytest.MonkeyPatch) -> list[Example]:
    """Return a list that takes down every example as trainers come to it."""
    seen = list[Example]()

    def noted(*args: Any) -> Iterator[Sequence[Example]]:
        for batch in batches(*args):
            seen.extend(batch)
            yield batch

    monkeypatch.setattr("fedloom.client.setup.batches", noted)
    return seen


def known_of(folder: Path) -> set[bytes]:
    """Return the examples that the audit takes a run of one round to have learnt from."""
    case = open_case(folder, console=Console(quiet=True))
    return {example.key for one in case.uploads() for example in learnt(case, one)}


def of(found: Audit, measure: str, number: int, seen: str = "upload") -> Finding:
    """Return the one finding that is of this measure and round."""
    (one,) = (x for x in found.findings if (x.measure, x.round, x.seen) == (measure, number, seen))
    return one


@pytest.fixture(scope="module")
def lora(small_recipe: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tune = {"lora": {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj"]}}
    return made(small_recipe, tmp_path_factory.mktemp("span") / "lora", tune=tune)


def test_the_words_that_the_audit_knows_of_are_those_of_the_batches(lora: Path):
    case = open_case(lora, console=Console(quiet=True), round=1)
    for one in case.uploads():
        (example,) = learnt(case, one)
        assert example in case.session.federation.shards[one.clients[0]].train
        assert set(tokens_of([example]).tolist()) == set(example.ids.tolist())


def test_it_knows_those_of_all_steps_and_no_further_ones(
    small_recipe: Make, trained_on: list[Example], tmp_path: Path
):
    local, run = {"steps": 2, "batch_size": 1, "accumulation": 2}, {"rounds": 1, "samples": 0}
    folder = made(small_recipe, tmp_path / "steps", local=local, run=run)
    assert len(trained_on) == 4 * 2 * 2
    assert known_of(folder) == {example.key for example in trained_on}


def test_nothing_goes_through_a_factor_that_the_other_one_blanks(lora: Path):
    first = audit(lora, ["span"])
    for one in read_round(lora, 1):
        moved = {name: bool(t.any()) for name, t in one.upload["delta"].items()}
        assert {bool(moved[name]) for name in moved if "lora_A" in name} == {False}
    still = of(first, "words found through A", 1)
    assert still.value == 0
    assert "nothing through A, which did not move at all" in still.says
    # B starts at 0: what A multiplies moves from the second round on.
    assert of(first, "words found through A", 2).value > 0.5
    assert of(first, "found words that are right through A", 2).value > 0.9
    near = of(first, "AUC through B", 1)
    assert near.value > 0.6
    assert near.interval is not None, "the mean of four clients by Student's t"
    assert 0 <= near.interval[0] < near.value < near.interval[1] <= 1


@pytest.mark.slow
def test_a_gradient_of_all_weights_names_its_words_and_a_sum_fewer_of_them(
    small_recipe: Make, tmp_path: Path
):
    pytest.importorskip("cryptography")
    sections: dict[str, Any] = {"tune": {"full": {}}, "run": {"rounds": 1, "samples": 0}}
    alone = audit(made(small_recipe, tmp_path / "each", **sections), ["span"])
    assert of(alone, "words found through weights", 1).value > 0.8
    assert of(alone, "found words that are right through weights", 1).value == 1.0
    together = audit(
        made(small_recipe, tmp_path / "sum", secure={"threshold": 3}, **sections), ["span"]
    )
    assert {one.seen for one in together.findings} == {"sum of 4", "model"}
    assert together.link == "fedavg, secure sum"
    one, four = (
        of(x, "AUC through weights", 1, seen).value
        for x, seen in ((alone, "upload"), (together, "sum of 4"))
    )
    assert one > four


@pytest.mark.slow
def test_seeds_that_both_sides_know_are_projected_on(
    small_recipe: Make, trained_on: list[Example], tmp_path: Path
):
    folder = made(
        small_recipe,
        tmp_path / "seeds",
        algorithm={"fedkseed": {"steps": 8}},
        tune={"seeds": {"num_seeds": 16}},
        local={"steps": None, "lr": 1e-4},
        run={"rounds": 1, "samples": 0},
    )
    assert known_of(folder) == {example.key for example in trained_on}
    said = audit(folder, ["span"])
    tells = of(said, "AUC through directions", 1)
    assert 0.2 < tells.value < 0.8
    assert of(said, "words found through directions", 1).value == 0


def test_cores_between_frozen_factors_are_seen_through_the_first_of_them(
    small_recipe: Make, tmp_path: Path
):
    tune = {"lora_xs": {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj"]}}
    run = {"rounds": 1, "samples": 0}
    said = audit(made(small_recipe, tmp_path / "cores", tune=tune, run=run), ["span"])
    tells = of(said, "AUC through core", 1)
    assert tells.value > max(0.7, tells.chance + 0.1)


def test_spaces_that_multiply_no_words_are_said_to_tell_nothing(small_recipe: Make, tmp_path: Path):
    tune = {"lora": {"rank": 2, "targets": ["down_proj"]}}
    folder = made(small_recipe, tmp_path / "late", tune=tune, run={"rounds": 1, "samples": 0})
    said = audit(folder, ["span"])
    assert not said.findings
    assert said.silent["span"].startswith("no tensor of lora, rank 2 multiplies what a word alone")


def test_tensors_that_stay_at_home_are_no_part_of_what_is_looked_at(
    small_recipe: Make, tmp_path: Path
):
    folder = made(
        small_recipe,
        tmp_path / "home",
        algorithm=[{"personal": {"local": "lora_B"}}, "fedavg"],
        tune={"lora": {"rank": 16, "targets": ["q_proj", "k_proj", "v_proj"]}},
    )
    said = audit(folder, ["span"], round=2)
    looked = {one.measure.partition("through ")[2] for one in said.findings if one.seen == "upload"}
    assert looked == {"A"}
    assert "did not move at all" in of(said, "words found through B", 2, "model").says
    assert of(said, "words found through A", 2).value > 0.5


def test_one_client_is_looked_at_alone(lora: Path):
    client = next(read_round(lora, 2)).clients[0]
    said = audit(lora, ["span"], client=client, round=2)
    assert {(one.client, one.round, one.seen) for one in said.findings} == {(client, 2, "upload")}
    case: Case = open_case(lora, console=Console(quiet=True), client=client, round=2)
    assert [one.clients for one in case.uploads()] == [(client,)]
