"""Recipes: what is written is what is run, and a mistake is one sentence that says where."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.private import Private
from fedloom.baselines import baseline_of, check_baseline
from fedloom.core.sparsity import Density
from fedloom.data.partition import Dirichlet
from fedloom.recipe import RecipeError, build_recipe, load_recipe, shipped
from fedloom.recipe_text import to_tree, to_yaml
from fedloom.recipe_yaml import read_yaml
from fedloom.reopen import flatten
from fedloom.rounds.recipe_settings import Baseline, Recipe
from fedloom.server.optimizers import Adam
from fedloom.server.samplers import Full, Uniform


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_valid_and_reads_back_as_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    file = tmp_path / "again.yaml"
    file.write_text(to_yaml(recipe))
    assert load_recipe(file) == recipe
    assert recipe.description, "a shipped recipe says what it runs"


def test_shipped_recipes_are_found() -> None:
    assert {"quickstart", "scaffold", "ditto", "gsm8k", "codealpaca", "xquad"} <= set(shipped())
    assert len(shipped()) == len(
        list((Path(__file__).parents[1] / "src/fedloom/recipes").glob("**/*.yaml"))
    )


def test_layers_nest_outermost_first() -> None:
    recipe = build_recipe(
        {"name": "x", "algorithm": [{"ditto": {"strength": 0.5}}, {"fedavg": {"server": "adam"}}]}
    )
    assert recipe.algorithm == Ditto(FedAvg(server=Adam()), strength=0.5)


def test_overrides_reach_sections_tables_and_algorithm_layers() -> None:
    recipe = load_recipe(
        "ditto",
        [
            "run.rounds=3",
            "algorithm.fedavg.mu=0.5",
            "algorithm.fedavg.server.adam.lr=1e-2",
            "cohort.uniform.size=2",
            "data.partition={dirichlet: {by: task, alpha: 0.1}}",
            "data.where.language=[english]",
        ],
    )
    assert recipe.run.rounds == 3
    assert recipe.algorithm == Ditto(FedAvg(server=Adam(lr=0.01), mu=0.5), strength=0.1)
    assert recipe.cohort == Uniform(2)
    assert recipe.data.partition == Dirichlet(by="task", alpha=0.1)
    assert recipe.data.where == {"language": ["english"]} or recipe.data.where == {
        "language": ("english",)
    }


def test_a_density_may_be_written_as_one_number() -> None:
    bare, nested = (
        build_recipe({"name": "x", "algorithm": [{"flasc": {"download": down}}, "fedavg"]})
        for down in (0.125, {"start": 0.125})
    )
    assert bare.algorithm == nested.algorithm == Flasc(FedAvg(), download=Density(0.125))
    assert to_tree(bare)["algorithm"][0]["flasc"]["download"]["start"] == 0.125
    recipe = load_recipe("flasc", ["algorithm.flasc.upload=0.0625"])
    assert isinstance(recipe.algorithm, Flasc)
    assert recipe.algorithm.upload == Density(0.0625)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"lokal": {}}, r"unknown key 'lokal' at the top \(did you mean 'local'\?\)"),
        ({"local": {"learning_rat": 1}}, r"unknown key 'learning_rat' in `local`"),
        (
            {"local": {"batchsize": 1}},
            r"unknown key 'batchsize' in `local` \(did you mean 'batch_size'\?\)",
        ),
        ({"local": {"lr": "fast"}}, r"local\.lr: .*got 'fast'"),
        (
            {"algorithm": [{"clustered": {"share": {"pool": {"half": 1}}}}, "fedavg"]},
            r"algorithm\.clustered\.share\.pool: input should be 'auto', 'on' or 'off', got",
        ),
        ({"run": {"rounds": True}}, r"run\.rounds must be a number, got True"),
        ({"run": {"rounds": 0}}, r"run\.rounds must be at least 1, got 0"),
        ({"run": {"baselines": ["lokal"]}}, r"run\.baselines: .*'local', 'centralised'"),
        (
            {"algorithm": "fedkseed", "tune": "seeds", "local": {"steps": 5}},
            r"local\.steps has no effect beside fedkseed, got 5: set algorithm\.fedkseed\.steps",
        ),
        ({"run": []}, r"run must hold settings by name, got \[\]"),
        (
            {"algorithm": "fedavgg"},
            r"algorithm: unknown name 'fedavgg' \(did you mean 'fedavg'\?\)",
        ),
        ({"algorithm": ["ditto"]}, r"ditto wraps another algorithm"),
        (
            {"algorithm": ["ditto", "flasc", {"ditto": {"strength": 1.0}}, "fedavg"]},
            r"ditto cannot be in itself, got \[ditto, flasc, ditto, fedavg\]: write it once",
        ),
        ({"algorithm": ["fedavg", "scaffold"]}, r"fedavg wraps nothing"),
        ({"algorithm": [{"fedavg": {"mu": -1}}]}, r"fedavg\.mu must be >= 0, got -1"),
        (
            {"algorithm": [{"flasc": {"upload": "dense"}}, "fedavg"]},
            r"algorithm\.flasc\.upload\.start: .*got 'dense'",
        ),
        (
            {"algorithm": [{"flasc": {"upload": 2.0}}, "fedavg"]},
            r"algorithm\.flasc\.upload: a density's start must be in \(0, 1\], got 2\.0",
        ),
        ({"algorithm": [{"a": 1, "b": 2}]}, r"algorithm: each layer must be a name or one"),
        ({"cohort": {"uniform": {"size": 2}, "full": {}}}, r"cohort must be one of uniform"),
        (
            {"cohort": {"uniform": {"sise": 2}}},
            r"unknown key 'sise' in `cohort\.uniform` \(did you mean 'size'\?\)",
        ),
        ({"cohort": "everyone"}, r"cohort: unknown name 'everyone'"),
        ({"cohort": "uniform"}, r"cohort\.uniform needs size"),
        (
            {"data": {"partition": {"dirichlet": {"alfa": 1}}}},
            r"unknown key 'alfa' in `data\.partition\.dirichlet`",
        ),
    ],
)
def test_a_mistake_is_named_with_its_path(tree: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_recipe({"name": "x", **tree})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.rounds", r"must look like section\.key=value, got 'run\.rounds'"),
        ("algorithm.fedprox.mu=1", r"the recipe's algorithm has no layer 'fedprox', only fedavg"),
        ("name.x=1", r"name: input should be a valid string"),
        ("run.rounds.x=1", r"run\.rounds\.x: 'x' is inside \d+, which has no keys"),
        ("run.rounds=[", r"the value of run\.rounds is not YAML"),
        ("=x", r"must look like section\.key=value, got '=x'"),
        ("a..b=1", r"unknown key 'a' at the top"),
        ("data..b=1", r"unknown key '' in `data`"),
        ("data=5", r"data must hold settings by name, got 5"),
        ("run.rounds=", r"run\.rounds: input should be a valid integer, got None"),
        ("algorithm=[]", r"algorithm: each layer must be a name or one .* got \[\]"),
        ("algorithm=", r"algorithm: each layer must be a name or one .* got None"),
        ("name=2020-01-01", r"name: input should be a valid string"),
        ("evaluation.by=no", r"evaluation\.by: input .* got False; YAML reads yes, no, on and off"),
        ("name=' '", r"name must be a word of 1 to 100 printable letters, got ' '"),
        ("name=..", r"name must be a word of 1 to 100 printable letters, got '\.\.'"),
        ('name="a\\0b"', r"name must be a word"),
        ("run.seed=2020-13-45", r"the value of run\.seed is not YAML .*no timestamp"),
        ("data.max_length=" + "9" * 99, r"larger than any number of a recipe"),
        ("local.lr=.nan", r"local\.lr: input should be a finite number, got nan"),
        ("local.lr=nan", r"local\.lr: input should be a finite number, got 'nan'"),
        ("local.lr=1e999", r"local\.lr: input should be a finite number, got '1e999'"),
        ("tune.lora.alpha=-.inf", r"tune\.lora\.alpha: input should be a finite number, got -inf"),
        ("data.fractions=[.nan, 0.1, 0.1]", r"data\.fractions: input should be a finite number"),
    ],
)
def test_a_bad_override_is_named(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("quickstart", [override])


def test_a_missing_or_broken_recipe_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError,
        match=r"no shipped recipe is called 'quikstart' \(did you mean 'quickstart'\?\)",
    ):
        load_recipe("quikstart")
    with pytest.raises(RecipeError, match=r"mine\.yaml does not exist"):
        load_recipe(tmp_path / "mine.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("run: [")
    with pytest.raises(RecipeError, match=r"broken\.yaml is not YAML"):
        load_recipe(broken)
    broken.write_text("run:\n  rounds: 1\n  rounds: 2\n")
    with pytest.raises(
        RecipeError, match=r"broken\.yaml .*line 3: the key 'rounds' stands in line 2"
    ):
        load_recipe(broken)
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.yaml does not exist, or is a folder"):
        load_recipe(tmp_path / "folder.yaml")
    broken.write_text("- run")
    with pytest.raises(RecipeError, match=r"must hold sections .* got list"):
        load_recipe(broken)


PATHS = sorted(
    {path for name in ("flasc", "xquad_clusters") for path in flatten(to_tree(load_recipe(name)))}
)
ODD = [
    "", "null", "true", "-1", "3", ".nan", "inf", "9" * 30, "1e400", "2020-13-45", "1:30", "!!binary x", "[]", "{}",
    "[[]]", "[1, a]", "{1: {}}", "{null: 1}", "{a: {b: c}}", "{a: 1, a: 2}", "&a [*a]", "'", "? [1]", '"\\0"',
    '"\\ud800"', "iid", "off", "seeds", "{uniform: {size: 3}}", "[fedavg]", "[ditto, fedavg]", "[{fedavg: [1]}]",
]  # fmt: skip
WORDS = st.sampled_from(["", "algorithm", "fedavg", "flasc", "data", "run", "local", "x", "inner"])
OVERRIDES = st.one_of(
    st.tuples(
        st.sampled_from(PATHS) | st.lists(WORDS | st.text(max_size=3), max_size=4).map(".".join),
        st.sampled_from(ODD) | st.text(max_size=8) | st.floats().map(str) | st.integers().map(str),
    ).map("=".join),
    st.text(max_size=10),
)


@given(
    st.sampled_from(["quickstart", "private", "flasc"]), st.lists(OVERRIDES, min_size=1, max_size=2)
)
def test_any_override_is_taken_or_refused_with_a_sentence(name: str, overrides: list[str]) -> None:
    try:
        recipe = load_recipe(name, overrides)
    except ValueError as error:
        said = str(error)
    else:
        said = "taken" if build_recipe(read_yaml(to_yaml(recipe))) == recipe else ""
    assert said.strip()


def test_a_recipe_with_rare_spaces_reads_back_as_itself() -> None:
    recipe = load_recipe("quickstart", ['description="a\\x85b \\u2028 ü"'])
    assert recipe.description == "a\x85b \u2028 ü"
    assert build_recipe(read_yaml(to_yaml(recipe))) == recipe


def test_the_resolved_tree_is_complete_and_plain() -> None:
    tree = to_tree(load_recipe("fedadam"))
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree
    flat = flatten(tree)
    assert flat["algorithm.fedavg.server.adam.lr"] == 0.005
    assert flat["cohort.uniform.size"] == 5
    assert flat["local.batch_size"] == 8


def test_baselines_share_data_seed_and_evaluation() -> None:
    recipe = load_recipe("fedadam")
    local = baseline_of(recipe, "local", summary={"num_clients": 10})
    assert (local.data, local.evaluation, local.run.seed) == (
        recipe.data,
        recipe.evaluation,
        recipe.run.seed,
    )
    assert not local.run.baselines
    central = baseline_of(recipe, "centralised", summary={"num_clients": 10})
    assert central.data.pooled
    assert central.cohort == Full()
    assert recipe.local.steps is not None
    assert central.local.steps == recipe.local.steps * 5, (
        "as many steps as the cohort of 5 together"
    )


# --- privacy -------------------------------------------------------------------------------------

PRIVATE = {
    "name": "x",
    "algorithm": [{"private": {"clip": 0.5, "epsilon": 4.0}}, "flasc", "fedavg"],
    "cohort": {"poisson": {"q": 0.1}},
    "run": {"rounds": 7},
}


@pytest.mark.parametrize(
    "cohort",
    [
        {"uniform": {"size": 10}},
        {"weighted": {"size": 10}},
        {"fixed": {"clients": ["a", "b"]}},
        {"poisson": {"q": 0.2}},
        "full",
    ],
)
def test_baselines_are_looked_at_before_it_is_known_how_many_clients_there_are(
    cohort: object,
) -> None:
    recipe = build_recipe({"name": "r", "algorithm": "fedavg", "cohort": cohort})
    made: tuple[Baseline, ...] = ("local", "centralised", "fedavg")
    for kind in made:
        check_baseline(recipe, kind)
    refused: tuple[Baseline, ...] = ("oracle", "random")
    for kind in refused:
        with pytest.raises(ValueError, match="takes oracle and random where the algorithm has"):
            check_baseline(recipe, kind)


def private(**sections: object) -> Recipe:
    return build_recipe({**PRIVATE, **sections})


def test_a_budget_is_for_the_rounds_of_the_run_unless_it_says_for_how_many() -> None:
    expected = Private(Flasc(FedAvg()), 0.5, epsilon=4.0, rounds=7)
    assert private().algorithm == expected
    assert build_recipe(to_tree(private())) == private()
    long = {"private": {"clip": 0.5, "epsilon": 4.0, "rounds": 90}}
    inside = private(algorithm=["ditto", long, "fedavg"])
    assert inside.algorithm == Ditto(Private(FedAvg(), 0.5, epsilon=4.0, rounds=90))
    noise = {"private": {"clip": 0.5, "noise_multiplier": 1.0}}
    assert private(algorithm=[noise, "fedavg"]).algorithm == Private(
        FedAvg(), 0.5, noise_multiplier=1.0
    )
    with pytest.raises(ValueError, match=r"private\.rounds must be at least run\.rounds \(91\)"):
        private(algorithm=[long, "fedavg"], run={"rounds": 91})


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"cohort": "full"}, r"cohort must be poisson for private, .* got full; write for example"),
        (
            {"cohort": {"uniform": {"size": 3}}},
            r"cohort must be poisson for private, .* got uniform",
        ),
        ({"run": {"min_replies": 2}}, r"run\.min_replies must be 0 for private, .* got 2"),
        ({"run": {"patience": 2}}, r"run\.patience must be 0 for private, .* got 2"),
        (
            {"algorithm": [{"private": {"clip": 1.0}}, "fedavg"]},
            "private needs either epsilon or noise_multiplier, got epsilon None",
        ),
        (
            {"algorithm": [{"private": {"epsilon": 1.0}}, "fedavg"]},
            r"algorithm\.private needs clip",
        ),
        (
            {"algorithm": [{"private": {"clip": float("inf"), "epsilon": 1.0}}, "fedavg"]},
            r"private\.clip: input should be a finite number, got inf",
        ),
        (
            {"algorithm": ["ditto", {"private": {"clip": 1, "epsilon": 1}}, "private", "fedavg"]},
            r"private cannot be in itself",
        ),
    ],
)
def test_what_would_void_an_epsilon_is_refused(sections: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        private(**sections)


def test_the_baselines_of_a_private_recipe_are_not_private() -> None:
    for made in (
        baseline_of(private(), "local", summary={"num_clients": 50}),
        baseline_of(private(), "centralised", summary={"num_clients": 50}),
    ):
        assert made.algorithm.server_sees == "mean"


def test_off_needs_no_quotes() -> None:
    assert load_recipe("quickstart", ["local.batched=off"]).local.batched == "off"
    with pytest.raises(RecipeError, match=r"local\.batched: .* got True"):
        load_recipe("quickstart", ["local.batched=on"])
