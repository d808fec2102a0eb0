"""What goes with `secure` and what does not: every pair works, or says why not."""

from typing import Any

import pytest

from fedloom.recipe import RecipeError, build_recipe

PRIVATE = {"private": {"clip": 1.0, "noise_multiplier": 1.0}}
SHARED = {"private": {"clip": 0.1, "noise_multiplier": 1.0, "noise": "distributed"}}
POISSON = {"poisson": {"q": 0.5}}
SEEDS = {"tune": {"seeds": {"num_seeds": 64}}, "local": {"optimizer": "sgd"}}
OFFSITE = {"tune": {"offsite": {"left": 1, "right": 1}}}
GIVEN = {"clustered": {"mode": {"given": {"by": "language"}}, "share": {"pool": "off"}}}
RANDOM = {"clustered": {"mode": {"random": {"num_clusters": 2}}, "share": {"pool": "off"}}}


def made(algorithm: Any = "fedavg", **sections: Any) -> Any:
    secure = sections.pop("secure", {"threshold": 3})
    return build_recipe({"name": "pair", "algorithm": algorithm, "secure": secure, **sections})


@pytest.mark.parametrize(
    ("algorithm", "sections"),
    [
        ("fedavg", {}),
        ({"fedavg": {"mu": 0.1, "server": "adam"}}, {}),
        ([PRIVATE, "fedavg"], {"cohort": POISSON}),
        (
            [PRIVATE, {"flasc": {"upload_on": "download", "error_feedback": True}}, "fedavg"],
            {"cohort": POISSON},
        ),
        ([SHARED, {"flasc": {"upload_on": "download"}}, "fedavg"], {"cohort": POISSON}),
        ([SHARED, "scaffold"], {"cohort": POISSON, "local": {"optimizer": "sgd"}}),
        ([{"flasc": {"upload_on": "download"}}, "fedavg"], {}),
        ([{"flasc": {"upload": 1}}, "fedavg"], {}),
        ([{"prune": {}}, "fedavg"], {}),
        ([{"freeze": {}}, "fedavg"], {}),
        ([{"alternate": {}}, "fedavg"], {}),
        ([GIVEN, "fedavg"], {}),
        ([RANDOM, {"flasc": {"upload_on": "download"}}, "fedavg"], {}),
        ([{"ditto": {"strength": 0.5}}, "fedavg"], {}),
        ([{"personal": {"local": "lora_B"}}, "fedavg"], {}),
        ([{"fedem": {}}, "fedavg"], {}),
        ("scaffold", {"local": {"optimizer": "sgd"}}),
        ("pfedme", {}),
        ({"fedkseed": {"uploads": "delta"}}, SEEDS),
        ("decomfl", SEEDS),
        ({"decomfl": {"votes": True}}, SEEDS),
        ("fedavg", OFFSITE),
        ("fedavg", {"engine": {"flower": {"nodes": 0}}}),
        ("fedavg", {"engine": "loopback"}),
    ],
)
def test_it_goes_with_what_reads_means_alone(algorithm: Any, sections: dict[str, Any]):
    recipe = made(algorithm, **sections)
    assert recipe.secure is not None
    assert recipe.algorithm.server_sees in ("mean", "noisy mean", "mean of each cluster")


READS = "secure hides single uploads, got {}, whose server reads {}: leave secure out"


@pytest.mark.parametrize(
    ("algorithm", "sections", "words"),
    [
        (
            {"fedavg": {"combine": {"krum": {"attackers": 1}}}},
            {},
            READS.format("fedavg", "each in full"),
        ),
        ({"fedavg": {"combine": "median"}}, {}, READS.format("fedavg", "each in full")),
        ({"fedavg": {"combine": "norm_bound"}}, {}, READS.format("fedavg", "each in full")),
        ([{"clustered": {}}, "fedavg"], {}, READS.format(r"clustered\(fedavg\)", "each")),
        (
            [{"clustered": {"mode": {"given": {"by": "language"}}}}, "fedavg"],
            {},
            READS.format(r"clustered\(fedavg\)", "each"),
        ),
        ([{"partial_pooling": {}}, "fedavg"], {}, READS.format(r".*\(fedavg\)", "each")),
        ("fedlora", {}, READS.format("fedlora", "each")),
        (
            [{"flasc": {}}, "fedavg"],
            {},
            "flasc.upload gives every client a mask of its own, of which a secure sum would send all",
        ),
        (
            [{"flasc": {"upload_on": "download", "error_feedback": True}}, PRIVATE, "fedavg"],
            {"cohort": POISSON},
            "flasc.error_feedback adds what was left out to an upload that private has clipped",
        ),
        ("fedkseed", SEEDS, "fedkseed.uploads must be delta with secure"),
        (
            [{"private": {**PRIVATE["private"], "quantile": 0.5}}, "fedavg"],
            {"cohort": POISSON},
            "private.quantile needs to know of single clients .*, which secure sums hide",
        ),
        ("fedavg", {"wire": {"upload": "int8"}}, "wire.upload has no effect beside secure"),
        (
            "fedavg",
            {"engine": {"flower": {"nodes": 2}}},
            "secure needs clients that hold their own",
        ),
        ("fedavg", {"engine": "ray"}, "secure needs clients that hold their own keys"),
        (
            "fedavg",
            {"cohort": {"uniform": {"size": 2}}},
            r"secure.threshold must be at most the clients of a round \(2\), got 3",
        ),
        ("fedavg", {"secure": {}}, "secure needs threshold"),
        ("fedavg", {"secure": {"threshold": 3, "bit": 20}}, "unknown key 'bit' in `secure`"),
        ("fedavg", {"secure": {"threshold": 1}}, "secure.threshold must be at least 2"),
    ],
)
def test_what_reads_single_uploads_or_has_no_effect_is_refused_with_its_reason(
    algorithm: Any, sections: dict[str, Any], words: str
):
    with pytest.raises((RecipeError, ValueError), match=words):
        made(algorithm, **sections)


def test_a_recipe_without_cryptography_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"pip install 'fedloom\[secure\]'"):
        made()
