import pytest

from fedloom.client.worker_settings import WorkerSettings
from fedloom.recipe import build_recipe
from fedloom.recipe_text import to_yaml

SMALL = {"name": "small", "algorithm": "fedavg"}


@pytest.mark.parametrize(
    ("worker", "words"),
    [
        ({"shards": 0}, "worker.shards must be at least 1, got 0"),
        ({"replicas": -1}, "worker.replicas must be at least 1, got -1"),
        ({"shards": 2, "replicas": 2}, "cannot both be above 1, got 2 and 2"),
        ({"shards": 2, "deadline": 0.5}, "worker.deadline must be in"),
        ({"deadline": 60.0}, "worker.deadline has no effect with one process"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(worker, words):
    with pytest.raises(ValueError, match=words):
        build_recipe({**SMALL, "worker": worker})


REFUSED = [
    ("shards", {"tune": "seeds"}, "local.order must be first, and tune no seeds"),
    ("replicas", {"local": {"order": "zeroth"}}, "local.order must be first"),
    ("shards", {"tune": "vera"}, "worker.shards 2 needs tune: lora or full, got vera"),
    ("shards", {"model": {"quantize": "int8"}}, "model.quantize must be none, got int8"),
    ("shards", {"objective": "dpo"}, "no whole model to compare with"),
    ("replicas", {"objective": "kto"}, "which kto's divergence is none of"),
    ("shards", {"local": {"group_tokens": 64}}, "leave local.group_tokens out"),
    ("shards", {"local": {"kernels": "onednn"}}, "local.kernels must be auto, got onednn"),
    ("replicas", {"local": {"batch_size": 1}}, "local.batch_size must be as much at least, got 1"),
    ("shards", {"engine": "ray"}, "set engine inprocess or flower"),
]


@pytest.mark.parametrize(("kind", "sections", "words"), REFUSED, ids=str)
def test_what_several_processes_cannot_train_is_refused_in_a_sentence(kind, sections, words):
    with pytest.raises(ValueError, match=words):
        build_recipe({**SMALL, **sections, "worker": {kind: 2}})


def test_a_recipe_says_how_many_processes_train_a_client():
    recipe = build_recipe({**SMALL, "worker": {"replicas": 3}})
    assert recipe.worker == WorkerSettings(replicas=3)
    assert recipe.worker.num_processes == 3
    assert "replicas: 3" in to_yaml(recipe)
