"""Every later command on a run whose data, model or folder has changed: refused with a sentence, or right."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.conftest import small_tree
from typer.testing import CliRunner

from fedloom import experiment
from fedloom.cli import app
from fedloom.recipe import build_recipe

COMMANDS: dict[str, list[str]] = {
    "evaluate": ["evaluate", "run"],
    "resume": ["resume", "run"],
    "export": ["export", "run"],
    "chat": ["chat", "run", "--client", "client-000", "--prompt", "hi"],
    "route": ["route", "run", "probe.txt"],
    "report": ["report", "run"],
    "compare": ["compare", "run"],
}
OPENED = ("evaluate", "resume", "export", "chat", "route")
TOLD = ("export", "report", "compare")
ALL = tuple(COMMANDS)
Change = Callable[[Path], object]
Said = dict[tuple[str, ...], str]


def rows(count: int) -> str:
    told = [{"prompt": f"Name {i}", "completion": f"code {i * 7919 % 97}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in told)


@pytest.fixture(scope="module")
def whole(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with data, a model, a probe and a finished run whose clients have memory."""
    home = tmp_path_factory.mktemp("whole")
    shutil.copytree(tiny_folder, home / "model")
    (home / "data.jsonl").write_text(rows(40))
    (home / "probe.txt").write_text("Name 3\n")
    tree = small_tree(
        Path("model"),
        algorithm=[{"ditto": {"steps": 1}}, "fedavg"],
        run={"rounds": 2, "samples": 1},
        evaluation={"every": 1, "max_examples": 2},
        local={"steps": 1},
    )
    tree["data"] = {"source": "data.jsonl", "num_clients": 2, "max_length": 64}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        experiment.run(build_recipe(tree), home / "run")
    return home


@pytest.fixture
def home(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a copy of all that, as if it had been begun there, and stand in it."""
    copied = Path(shutil.copytree(whole, tmp_path / "home"))
    told = copied / "run" / "inputs.json"
    told.write_text(told.read_text().replace(str(whole), str(copied)))
    monkeypatch.chdir(copied)
    monkeypatch.setenv("COLUMNS", "200")
    return copied


def typed(command: Sequence[str]) -> tuple[str | None, str]:
    """Return the sentence of a refusal, None where there was none, and what was printed."""
    result = CliRunner().invoke(app, list(command))
    if result.exception is None or isinstance(result.exception, SystemExit):
        assert result.exit_code == 0, result.output
        return None, result.output
    if not isinstance(result.exception, (ValueError, OSError)):
        raise result.exception
    return str(result.exception), result.output


def tree_of(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
    }


def more_data(home: Path) -> None:
    (home / "data.jsonl").write_text(rows(60))


def other_weights(home: Path) -> None:
    file = home / "model" / "model.safetensors"
    tensors = load_file(file)
    name = sorted(name for name in tensors if "embed" not in name)[0]
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})


def other_tokenizer(home: Path) -> None:
    file = home / "model" / "tokenizer.json"
    told = json.loads(file.read_text())
    vocab = told["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(told))


def other_template(home: Path) -> None:
    file = home / "model" / "chat_template.jinja"
    file.write_text(file.read_text() + "{# another #}")


def other_config(home: Path) -> None:
    file = home / "model" / "config.json"
    told = json.loads(file.read_text())
    told["rms_norm_eps"] = 1e-3
    file.write_text(json.dumps(told))


def gone(name: str) -> Change:
    def change(home: Path) -> None:
        path = home / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def cut(name: str, keep: float = 0.6) -> Change:
    def change(home: Path) -> None:
        path = home / name
        path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])

    return change


def text(name: str, content: str) -> Change:
    def change(home: Path) -> None:
        path = home / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)

    return change


def line(name: str, content: str) -> Change:
    def change(home: Path) -> None:
        path = home / "run" / name
        first, *others = path.read_text().splitlines(keepends=True)
        path.write_text("".join([first, content + "\n", *others]))

    return change


def without_last(name: str, lines: int = 1) -> Change:
    def change(home: Path) -> None:
        path = home / "run" / name
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:-lines]))

    return change


def binary(name: str) -> Change:
    def change(home: Path) -> None:
        (home / name).write_bytes(b"\xff\xfe\x00garbage")

    return change


def a_file(home: Path) -> None:
    shutil.rmtree(home / "run")
    (home / "run").write_text("x")


def all_checkpoints_cut(home: Path) -> None:
    for path in (home / "run" / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-9])


@pytest.fixture(scope="module")
def right(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function that says what a command prints of the untouched run; of `resume`, the state it ends in."""

    @cache
    def printed(command: str) -> str:
        if command == "resume":
            return state_of(whole)
        copied = shutil.copytree(whole, tmp_path_factory.mktemp("right") / "home")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(copied)
            patch.setenv("COLUMNS", "200")
            refusal, said = typed(COMMANDS[command])
        assert refusal is None
        return said

    return printed


def state_of(home: Path) -> str:
    return str(json.loads((home / "run/summary.json").read_text())["state_sha256"])


def until(name: str, mark: str) -> Change:
    def change(home: Path) -> None:
        path = home / name
        path.write_text(path.read_text().partition(mark)[0] + "\n")

    return change


def edited(name: str, old: str, new: str) -> Change:
    def change(home: Path) -> None:
        path = home / name
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    return change


CHANGED = r"^what the run in run was begun with on 20\d\d-\d\d-\d\d \d\d:\d\d has changed: "
REMEDY = (
    r" then and \w+ now: put it back, begin a new run, or take what is there now with --anyway$"
)
NO_RUN = "^run holds no run: it has no recipe.yaml; `fedloom run` makes one$"
BACK = "put back the one this run was begun with$"
ANEW = "`fedloom resume run` writes it anew$"
WITHOUT = "remove it to go on without it$"
NONE_GOOD = r"^no checkpoint in run/checkpoints can be gone on from: .*"
MISSING = "put back what is missing, or begin a new run$"
ROUND = "line 2 of run/metrics.jsonl is no object with the number of a round: remove it"
PASSED_OVER = "as a newer one is damaged|left out a damaged checkpoint"
SHORT = r"^run/metrics.jsonl {} but summary.json tells of 2 rounds: put it back as the run wrote it, or go on with"
LINES = rf"{NONE_GOOD}{{}} holds 0 of the \d+ lines up to round 1; .*{MISSING}"

CHANGES: dict[str, tuple[Change, Said]] = {
    "nothing": (lambda home: None, {}),
    "more data": (
        more_data,
        {("evaluate", "resume"): rf"{CHANGED}split of the data \(data.source\), .*{REMEDY}"},
    ),
    "data gone": (
        gone("data.jsonl"),
        {
            ("evaluate",): "^evaluate reads the data of the run again, .*data.jsonl does not exist",
            ("resume",): "data.source .*data.jsonl does not exist",
        },
    ),
    "other weights": (
        other_weights,
        {OPENED: rf"{CHANGED}weights of the base model \(model.name, .*{REMEDY}"},
    ),
    "other tokenizer": (other_tokenizer, {OPENED: rf"{CHANGED}tokenizer \(model.name, .*{REMEDY}"}),
    "other template": (other_template, {OPENED: rf"{CHANGED}chat template \(.*{REMEDY}"}),
    "other config": (other_config, {OPENED: rf"{CHANGED}configuration of the model .*{REMEDY}"}),
    "model gone": (
        gone("model"),
        {
            OPENED: r"^model.name model was .*home/model when the run in run was begun, and is gone: put"
        },
    ),
    "inputs.json gone": (
        gone("run/inputs.json"),
        {
            OPENED: "^run/inputs.json is gone, which says what data .* take what is there now with --any"
        },
    ),
    "inputs.json cut": (
        cut("run/inputs.json"),
        {OPENED: "^run/inputs.json is not JSON .*: put back"},
    ),
    "inputs.json a list": (
        text("run/inputs.json", "[]"),
        {
            OPENED: "^run/inputs.json must hold an object, got list: put back the file as the run wrote it"
        },
    ),
    "inputs.json of something else": (
        text("run/inputs.json", "{}"),
        {OPENED: r"^run/inputs.json is not what a run writes \('model'\): put back"},
    ),
    "recipe.yaml gone": (gone("run/recipe.yaml"), {ALL: NO_RUN}),
    "recipe.yaml cut": (
        until("run/recipe.yaml", "gine:"),
        {ALL: f"^run/recipe.yaml is not YAML .*{BACK}"},
    ),
    "recipe.yaml cut at a line": (
        until("run/recipe.yaml", "\nengine:"),
        {OPENED: f"^run/recipe.yaml ends too early: {BACK}"},
    ),
    "recipe.yaml empty": (
        text("run/recipe.yaml", ""),
        {ALL: f"^run/recipe.yaml must hold the sections of a recipe, got an empty file: {BACK}"},
    ),
    "recipe.yaml a list": (text("run/recipe.yaml", "- a\n"), {ALL: f"got list: {BACK}"}),
    "recipe.yaml no text": (
        binary("run/recipe.yaml"),
        {ALL: r"not text in UTF-8 \(byte 0\): put back"},
    ),
    "recipe.yaml of another run": (
        edited("run/recipe.yaml", "strength: 0.1", "strength: 0.2"),
        {
            OPENED: r"was written under another recipe, algorithm.ditto.strength was 0.1 and is 0.2: take"
        },
    ),
    "manifest.json gone": (
        gone("run/manifest.json"),
        {("export", "chat", "route"): f"^run/manifest.json cannot be read .*{ANEW}"},
    ),
    "manifest.json cut": (
        cut("run/manifest.json"),
        {
            ("export", "chat", "route"): f"^run/manifest.json is not JSON .*{ANEW}",
            ("report", "compare"): f"^run/manifest.json is not JSON .*{WITHOUT}",
        },
    ),
    "manifest.json of something else": (
        text("run/manifest.json", '{"clients": 5}'),
        {
            ("export", "chat", "route"): f"^run/manifest.json is no manifest of a split .*{ANEW}",
            ("report", "compare"): f"^run/manifest.json is no manifest of a split: {WITHOUT}",
        },
    ),
    "manifest.json of another split": (
        edited("run/manifest.json", '"sha256": "', '"sha256": "0'),
        {("export", "chat", "route"): f"{CHANGED}split of the data .*{REMEDY}"},
    ),
    "summary.json a number": (
        text("run/summary.json", "5"),
        {TOLD: f"^run/summary.json must hold an object, got int: {WITHOUT}"},
    ),
    "summary.json gone": (gone("run/summary.json"), {}),
    "samples.json of something else": (
        text("run/samples.json", "[5]"),
        {TOLD: f"^run/samples.json holds no samples as a run writes them: {WITHOUT}"},
    ),
    "environment.json cut": (
        cut("run/environment.json"),
        {TOLD: f"^run/environment.json is not JSON .*{WITHOUT}"},
    ),
    "metrics.jsonl gone": (
        gone("run/metrics.jsonl"),
        {
            ("resume",): LINES.format("metrics.jsonl"),
            TOLD: "^run is no run directory: it holds no metrics.jsonl; give the folder of a run$",
        },
    ),
    "metrics.jsonl without its end": (
        without_last("metrics.jsonl"),
        {TOLD: SHORT.format("ends at round 1,")},
    ),
    "metrics.jsonl no text": (
        binary("run/metrics.jsonl"),
        {("resume",): LINES.format("metrics.jsonl"), TOLD: SHORT.format("holds no round,")},
    ),
    "metrics.jsonl with a number": (line("metrics.jsonl", "5"), {("resume", *TOLD): ROUND}),
    "metrics.jsonl with a word": (line("metrics.jsonl", '"x"'), {("resume", *TOLD): ROUND}),
    "metrics.jsonl without a round": (
        line("metrics.jsonl", '{"test/loss": 1}'),
        {("resume", *TOLD): ROUND},
    ),
    "metrics.jsonl with a half round": (
        line("metrics.jsonl", '{"round": 0.5}'),
        {("resume", *TOLD): ROUND},
    ),
    "metrics.jsonl with a loss in words": (
        line("metrics.jsonl", '{"round": 1, "test/loss": "x"}'),
        {
            (
                "resume",
                *TOLD,
            ): "^line 2 of run/metrics.jsonl has test/loss 'x', which is no number: rem"
        },
    ),
    "metrics.jsonl with a line twice": (
        line("metrics.jsonl", '{"round": 0}'),
        {
            (
                "resume",
            ): rf"{NONE_GOOD}metrics.jsonl holds 3 lines up to round 1, where the run wrote 2",
            TOLD: "^run/metrics.jsonl has round 0 where round 1 should be: put it back as the run wrote",
        },
    ),
    "clients.jsonl gone": (
        gone("run/clients.jsonl"),
        {
            ("resume",): LINES.format("clients.jsonl"),
            TOLD: r"^run/clients.jsonl tells of 0 of the \d+ validation examples of round 0: put it back",
        },
    ),
    "clients.jsonl without its end": (
        without_last("clients.jsonl"),
        {TOLD: r"^run/clients.jsonl tells of \d+ of the \d+ test examples of round 2: put it back"},
    ),
    "clients.jsonl without a client": (
        line("clients.jsonl", '{"round": 1}'),
        {
            (
                "resume",
                *TOLD,
            ): "^line 2 of run/clients.jsonl has no client as a run writes it: remove it"
        },
    ),
    "clients.jsonl with null": (
        line("clients.jsonl", "null"),
        {
            (
                "resume",
                *TOLD,
            ): "^line 2 of run/clients.jsonl is no object with the number of a round: r"
        },
    ),
    "client state gone": (
        gone("run/client_state"),
        {
            OPENED: f"{NONE_GOOD}the client state of client-000 after round 2 is missing from run/.*{MISSING}"
        },
    ),
    "client state of one gone": (
        gone("run/client_state/client-001"),
        {
            OPENED: f"{NONE_GOOD}the client state of client-001 after round 2 is missing from run/.*{MISSING}"
        },
    ),
    "client state cut": (cut("run/client_state/client-000/2"), {}),
    "client state of another client": (
        lambda home: shutil.copy("run/client_state/client-001/2", "run/client_state/client-000/2"),
        {},
    ),
    "client state with a foreign file": (text("run/client_state/notes.txt", "x"), {}),
    "client state with a foreign number": (text("run/client_state/client-000/007", "x"), {}),
    "client state a file": (
        lambda home: (gone("run/client_state")(home), text("run/client_state", "x")(home)),
        {
            ("resume",): "^run/client_state is no folder: remove it$",
            (
                "evaluate",
                "export",
                "chat",
                "route",
            ): f"{NONE_GOOD}.* is missing from run/client_state; {MISSING}",
        },
    ),
    "checkpoints with a foreign file": (text("run/checkpoints/round-7.ckpt", "x"), {}),
    "checkpoints gone": (
        gone("run/checkpoints"),
        {
            (
                "resume",
            ): "^run tells of 2 rounds, but run/checkpoints holds no checkpoint: put them back",
            (
                "evaluate",
                "export",
                "chat",
                "route",
            ): "^run/checkpoints holds no checkpoint to resume from: ",
        },
    ),
    "checkpoints cut": (
        all_checkpoints_cut,
        {OPENED: rf"{NONE_GOOD}round-000002.ckpt does not match its SHA-256; .*{MISSING}"},
    ),
    "newest checkpoint cut": (cut("run/checkpoints/round-000002.ckpt"), {}),
    "the folder a file": (a_file, {ALL: "^run is a file: give the folder of a run$"}),
    "the folder gone": (gone("run"), {ALL: NO_RUN}),
    "anyway.jsonl of something else": (
        text("run/anyway.jsonl", "5\n"),
        {("resume", *TOLD): "^line 1 of run/anyway.jsonl is not what a command writes: remove it$"},
    ),
    "a lock of a process that is gone": (text("run/lock", '{"pid": 1, "host": "x"}'), {}),
}
"""What happens to a run, and the sentence of each command that refuses it; all others must be right."""
BACKED = {
    "metrics.jsonl without its end",
    "clients.jsonl without its end",
    "client state cut",
    "client state of another client",
    "newest checkpoint cut",
}
"""An older checkpoint stands in, which is said: `resume` ends as if nothing had happened."""
QUICK = {"nothing", "client state cut"}


def cases() -> list[Any]:
    """Return every command on every change; of those that one sentence refuses, one is tried each time."""
    out = []
    for change, (_, said) in CHANGES.items():
        told = {command: sentence for commands, sentence in said.items() for command in commands}
        first = {sentence: commands[-1] for commands, sentence in said.items()}
        for command in COMMANDS:
            sentence = told.get(command)
            quick = change in QUICK if sentence is None else first[sentence] == command
            marks = [] if quick else [pytest.mark.slow]
            case = pytest.param(change, command, sentence, marks=marks, id=f"{command}-{change}")
            out.append(case)
    return out


@pytest.mark.parametrize(("change", "command", "sentence"), cases())
def test_a_command_on_a_changed_run_is_refused_with_a_sentence_or_right(
    change: str, command: str, sentence: str | None, home: Path, right: Callable[[str], str]
) -> None:
    CHANGES[change][0](home)
    before = tree_of(home)
    refusal, said = typed(COMMANDS[command])
    if sentence is not None:
        assert refusal is not None, "not refused"
        assert re.search(sentence, refusal), refusal
        assert "\n" not in refusal
        assert tree_of(home) == before, "a refused command changes nothing"
        return
    assert refusal is None, refusal
    if command == "resume":
        assert state_of(home) == right(command)
        assert not (home / "run" / "lock").exists()
    elif change not in BACKED and command not in ("report", "compare"):
        assert said == right(command)
    if change in BACKED and command in OPENED and "jsonl" not in change:
        assert re.search(PASSED_OVER, said)
    if command in ("evaluate", "chat", "route"):
        assert tree_of(home) == before, "a command that reads changes nothing"


@pytest.mark.parametrize("command", ["evaluate", "export", "chat", "route"])
def test_what_was_taken_anyway_is_written_down_and_told_in_the_report(
    command: str, home: Path
) -> None:
    more_data(home)
    other_weights(home)
    refusal, said = typed([*COMMANDS[command], "--anyway"])
    assert refusal is None
    (note,) = [json.loads(row) for row in (home / "run/anyway.jsonl").read_text().splitlines()]
    assert note["command"] == command
    # Only what reads the data can tell that it has changed.
    keys = ["data", "base"] if command == "evaluate" else ["base"]
    assert [each["key"] for each in note["differs"]] == keys
    assert f"{command} was told to go on although this had changed" in said
    assert typed(["report", "run"])[0] is None
    page = (home / "run/report.html").read_text()
    assert f"{command} was told to go on although this had changed" in page


def test_a_run_that_goes_on_anyway_is_bound_to_what_it_goes_on_with(home: Path) -> None:
    more_data(home)
    assert typed(["resume", "run", "run.rounds=3"])[0] is not None
    assert typed(["resume", "run", "run.rounds=3", "--anyway"])[0] is None
    assert json.loads((home / "run/anyway.jsonl").read_text())["command"] == "resume after round 2"
    assert typed(COMMANDS["evaluate"])[0] is None
    assert typed(COMMANDS["chat"])[0] is None
    (home / "data.jsonl").write_text(rows(40))
    assert re.search(CHANGED, typed(COMMANDS["evaluate"])[0] or "")


@pytest.mark.parametrize("space", ["full", "seeds"])
def test_coordinates_that_count_from_other_weights_are_never_taken(
    space: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_folder, "model")
    sections: dict[str, Any] = {
        "tune": {space: {"num_seeds": 16} if space == "seeds" else {}},
        "run": {"rounds": 1, "samples": 0},
        "evaluation": {"every": 0, "generate": False, "max_examples": 1},
    }
    if space == "seeds":
        sections |= {"algorithm": {"fedkseed": {"steps": 2}}, "local": {"lr": 1e-4, "steps": None}}
    experiment.run(build_recipe(small_tree(Path("model"), **sections)), tmp_path / "run")
    other_weights(tmp_path)
    for command in ("chat", "resume"):
        typed_as = [one for one in COMMANDS[command] if one not in ("--client", "client-000")]
        refusal = typed([*typed_as, "--anyway"])[0]
        assert refusal is not None
        assert re.search(
            rf"{CHANGED}weights .*: put it back, or begin a new run; what was learnt", refusal
        )


def test_a_refused_override_leaves_the_run_as_it_was(home: Path) -> None:
    before = tree_of(home)
    for override in (
        "local.lr=0.2",
        "data.num_clients=3",
        "run.seed=1",
        "tune.lora.rank=4",
        "evaluation.every=2",
    ):
        refusal = typed(["resume", "run", override])[0]
        assert refusal is not None
        assert f"another recipe, {override.partition('=')[0]} was" in refusal
        assert tree_of(home) == before
    assert typed(["resume", "run"])[0] is None


def test_a_model_that_has_moved_is_the_same_model(home: Path, right: Callable[[str], str]) -> None:
    shutil.move("model", "elsewhere")
    assert "--model PATH" in (typed(COMMANDS["chat"])[0] or "")
    assert typed([*COMMANDS["chat"], "--model", "elsewhere"]) == (None, right("chat"))
    assert typed(["resume", "run", "model.name=elsewhere"])[0] is None
    assert state_of(home) == right("resume")
    assert typed(COMMANDS["chat"]) == (None, right("chat"))


def test_relative_paths_of_a_recipe_hold_from_any_directory(
    home: Path, right: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "else").mkdir()
    monkeypatch.chdir(home / "else")
    for command in ("evaluate", "chat", "resume"):
        refusal, said = typed([part.replace("run", "../run") for part in COMMANDS[command]])
        assert refusal is None
        assert command == "resume" or said == right(command)
    assert state_of(home) == right("resume")
    told = json.loads((home / "run/manifest.json").read_text())
    assert told["source"] == "data.jsonl"


def test_another_file_of_the_name_is_not_taken_for_the_runs(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (home / "else").mkdir()
    (home / "else/data.jsonl").write_text(rows(60))
    monkeypatch.chdir(home / "else")
    refusal = typed(["evaluate", "../run"])[0]
    assert refusal is not None
    assert "has changed: split of the data" in refusal


def test_a_run_whose_clients_hold_no_test_data_says_so_and_still_delivers(
    home: Path, tiny_folder: Path
) -> None:
    tree = small_tree(Path("model"), run={"rounds": 1, "samples": 1})
    for name, fractions in {"some": [0.9, 0.1, 0.0], "none": [1.0, 0.0, 0.0]}.items():
        tree["data"] = {**tree["data"], "source": "data.jsonl", "where": {}, "num_examples": None}
        tree["data"]["fractions"] = fractions
        experiment.run(build_recipe(tree), home / name)
        refusal = typed(["evaluate", name])[0]
        assert refusal is not None
        assert re.search(f"^no client of {name} holds test data: data.fractions .*, 0 ", refusal)
        assert (home / name / "adapters/global/adapter_model.safetensors").exists()
        assert typed(["chat", name, "--prompt", "hi"])[0] is None
