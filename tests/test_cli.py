"""The command line as a newcomer types it; every command of the README is run here."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from typer.testing import CliRunner

import fedloom
from fedloom import cli
from fedloom.experiment import new_folder

README = Path(__file__).parents[1] / "README.md"
SMALL = (
    "data.num_examples=240",
    "run.rounds=1",
    "run.samples=2",
    "local.steps=1",
    "evaluation.max_examples=2",
    "evaluation.max_new_tokens=2",
)
Typed = Callable[..., str]


@pytest.fixture
def typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Typed:
    """Return a function that types a command in an empty folder and returns what is printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def type_(command: str, code: int = 0) -> str:
        monkeypatch.setattr("sys.argv", ["fedloom", *shlex.split(command)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        assert (end.value.code or 0) == code, said.out + said.err
        return said.out + said.err

    return type_


def commands() -> list[str]:
    """Return the README's fedloom commands that need nothing but the package, in order."""
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(), flags=re.DOTALL)
    lines = [line.partition("   #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line.startswith("fedloom ")]


@pytest.mark.slow
def test_every_command_of_the_readme_runs(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that name a Hub model or the reader's own file are run on stand-ins, in another test; the board ends at once."""
    served: list[Any] = []
    monkeypatch.setattr("uvicorn.Server.run", lambda self, sockets: served.append(sockets[0]))
    own = [c for c in commands() if "Qwen" in c or "mine.jsonl" in c]
    assert len(own) == 2
    ran = [c for c in commands() if c not in own]
    assert len(ran) >= 15
    plan = README.parent / "examples/methods.yaml"
    (tmp_path / "examples").mkdir()
    # One seed, as eighteen runs are for readers.
    text = plan.read_text().replace("seeds: [0, 1, 2]", "seeds: [0]")
    (tmp_path / "examples/methods.yaml").write_text(text)
    space = (README.parent / "examples/space.yaml").read_text()
    few = space.replace("successive_halving: {eta: 3}", "trials: 2").replace(
        "rounds: 40", "rounds: 2"
    )
    (tmp_path / "examples/space.yaml").write_text(few)
    (tmp_path / "newcomer.jsonl").write_text('{"prompt": "¿Y el plural?", "completion": "gatos"}\n')
    for command in ran:
        words = shlex.split(command)[1:]
        if words[0] in ("run", "plan", "data", "bench", "tune"):
            words[2:2] = SMALL
        said = typed(shlex.join(words))
        assert said.strip(), command
    assert (tmp_path / "runs/prox/report.html").exists()
    assert (tmp_path / "runs/prox/merged/global/config.json").exists()
    assert (tmp_path / "compare.html").exists()
    assert (tmp_path / "runs/methods/table.tex").exists()
    assert (tmp_path / "runs/quickstart-space/best.yaml").exists()
    assert len(served) == 1


def test_the_readmes_python_is_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (block,) = re.findall(r"```python\n(from pathlib.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    small = ", ".join(repr(override) for override in SMALL)
    exec(block.replace('"run.rounds=2", "data.num_examples=600"', small), {})
    assert (tmp_path / "runs/from-python/summary.json").exists()


def test_own_text_with_a_natural_split(typed: Typed, tmp_path: Path, tiny_folder: Path) -> None:
    """The README's `data.source=mine.jsonl` with a split by hospital, and a model from a folder."""
    rows = "".join(
        f'{{"prompt": "Dose {i}?", "completion": "{i} mg", "hospital": "{"north" if i % 2 else "south"}"}}\n'
        for i in range(40)
    )
    (tmp_path / "mine.jsonl").write_text(rows)
    partition = "data.partition={natural: {by: hospital}}"
    source = f"quickstart data.source=mine.jsonl {shlex.quote(partition)} {' '.join(SMALL)}"
    said = typed(f"run {source} model.name={tiny_folder} run.baselines=[]")
    assert "2 clients" in said


def test_a_new_client_finds_its_cluster_and_a_prompt_its_model(
    typed: Typed, tmp_path: Path, tiny_folder: Path
) -> None:
    settings = (
        "algorithm=[{clustered: {mode: {given: {by: group}}}}, fedavg]",
        "data.partition={clusters: {by: language}}",
        "data.where={language: [de, en]}",
        "data.num_clients=4",
        "data.max_length=192",
        "run.baselines=[]",
        "evaluation.by=language",
        f"model.name={tiny_folder}",
    )
    said = typed(f"run quickstart {shlex.join([*SMALL, *settings])}")
    assert "Worst loss" in said
    (tmp_path / "new.txt").write_text("Was ist das?\nWer ist da?\n")
    said = typed("route runs/quickstart new.txt")
    assert re.search(
        r"cluster-[01]( suits best:| is) \d+ % likely from 2 prompts, 50 % by the", said
    )
    assert "client-000, client-001" in said
    said = typed("chat runs/quickstart --cluster auto --prompt Hallo")
    assert re.search(
        r"cluster-[01]( suits best:| is) \d+ % likely from 1 prompt, 50 % by the", said
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            "run quikstart",
            r"no shipped recipe is called 'quikstart' \(did you mean 'quickstart'\?\)",
        ),
        ("run quickstart lokal.lr=1", r"unknown key 'lokal' at the top \(did you mean 'local'\?\)"),
        ("run quickstart local.lr=fast", r"local\.lr: .*got 'fast'"),
        ("run quickstart data.source=none.jsonl", r"data\.source.*none\.jsonl"),
        (
            "run quickstart cohort.uniform.size=11 run.baselines=[]",
            r"cohort\.uniform\.size must be at most the 10 reachable clients, got 11",
        ),
        (
            "run quickstart model.name=nobody/nothing",
            r"model\.name must be a causal language model",
        ),
        (
            "run quickstart model.name=./nothing",
            r"model\.name must be a folder with a config\.json",
        ),
        ("run quickstart tune.lora.targets=[q_prj]", r"tune\.lora\.targets.*q_prj"),
        ("run quickstart data.num_examples=12 data.num_clients=20", r"data\.num_clients .*20"),
        ("run quickstart data.partition.dirichlet.by=tusk", r"data\.partition.*tusk"),
        ("run quickstart run.trackers=[dashboard]", r"run\.trackers may hold .* got 'dashboard'"),
        (
            "run ditto run.rounds=1 algorithm.fedprox.mu=1",
            r"has no layer 'fedprox', only ditto, fedavg",
        ),
        ("resume nowhere", r"nowhere holds no run"),
        ("report nowhere", r"nowhere holds no run"),
        ("route nowhere probe.txt", r"nowhere holds no run"),
        (
            "chat nowhere --client a --cluster b",
            r"take --client or --cluster, got both \(a and b\)",
        ),
        ("recipes cp nothing", r"no shipped recipe is called 'nothing'"),
        ("recipes cp quickstart folder", r"folder exists already"),
        ("recipes cp quickstart no/x.yaml", r"must be in a folder that is there, got no/x\.yaml"),
        ("run ''", r"argument 2 of the command is empty"),
        ("run folder", r"no shipped recipe is called 'folder'"),
        ("run '[/x]'", r"no shipped recipe is called '\[/x\]'"),
        ("run quickstart --out file.txt", r"--out must be a folder, got file\.txt"),
        ("run quickstart --out file.txt/run", r"--out must be a folder, got file\.txt/run"),
        ("run quickstart data.source=folder", r"data\.source folder holds no file that ends in"),
        ("run quickstart model.name=folder", r"model\.name must be a folder with a config\.json"),
        ("run quickstart model.name=file.txt", r"model\.name file\.txt is no GGUF file"),
        ("plan quickstart model.name=folder", r"model\.name"),
        ("data quickstart --picture folder", r"--picture must be a file, got folder"),
        ("data quickstart --picture no/x.png", r"--picture must be in a folder that is there"),
        ("data quickstart --picture x.gif", r"--picture must end in \.png or \.svg or \.pdf"),
        ("evaluate file.txt", r"file\.txt is a file: give the folder of a run"),
        ("export folder --for merged", r"folder holds no run"),
        ("export folder --out file.txt", r"folder holds no run"),
        (
            "export folder --merged --for gguf",
            r"--merged is short for --for merged, got --for gguf too",
        ),
        ("export folder --as-lora", r"--as-lora is --for lora now"),
        ("export folder --for onnx", r"--for must be one of peft, lora, vllm, .*, got onnx"),
        (
            "export folder --for vllm --type F16",
            r"--type is that of whole models as GGUF, .* got f16",
        ),
        (
            "apply file.txt builtin:tiny",
            r"file\.txt is no seed file: give one that `fedloom export",
        ),
        ("apply file.txt builtin:tiny -o folder/x", r"file\.txt is no seed file"),
        ("chat folder --prompt x", r"folder holds no run"),
        ("compare folder file.txt", r"folder holds no run"),
        ("status file.txt", r"file\.txt has no status\.json"),
    ],
)
def test_a_mistake_is_one_sentence(
    command: str, message: str, typed: Typed, tmp_path: Path
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file.txt").write_text("x\n")
    said = typed(command, code=2)
    assert re.search(message, said.replace("\n", " ")), said
    assert "Traceback" not in said
    assert not list(tmp_path.glob("runs/*/recipe.yaml")), "a run that cannot begin leaves no run"


def test_a_name_full_of_markup_is_a_name(
    typed: Typed, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"Q {i}", "completion": "[/a]", "who": "[/c]" if i % 2 else "$[b$:x:"}
        for i in range(40)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "new.txt").write_text("[/q]\n")
    settings = (
        "name='[/x] [bold]'",
        "data.source=d.jsonl",
        "data.partition={natural: {by: who}}",
        "data.num_clients=null",
        "run.baselines=[]",
        "evaluation.by=who",
        f"model.name={tiny_folder}",
    )
    source = f"quickstart {shlex.join([*SMALL[1:], *settings])}"
    for command in (f"run {source} --out R", f"plan {source}", "evaluate R", "compare R"):
        assert "[/x] [bold]" in typed(command), command
    said = typed(f"data {source}")
    assert "[/c]" in said
    assert "[-x] [bold]-split.png" in said
    typed("evaluate R")
    typed("report R")
    typed("route R new.txt")
    assert "got '[/q]'" in typed("compare R --metric '[/q]'", code=2)
    assert "R/merged" in typed("export R --for merged")
    monkeypatch.setattr("sys.stdin", io.StringIO("[/y]\n"))
    assert "model:" in typed("chat R"), "which the end of the input ends"


def test_a_copied_recipe_is_the_shipped_one(typed: Typed, tmp_path: Path) -> None:
    typed("recipes cp fedadam mine.yaml")
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["algorithm"]
    assert "exists already" in typed("recipes cp fedadam mine.yaml", code=2)


def test_help_lists_every_command_and_runs_before_all_others() -> None:
    said = CliRunner().invoke(cli.app, ["--help"]).output
    assert CliRunner().invoke(cli.app, []).output.strip() == said.strip(), (
        "nothing is missing where nothing is asked"
    )
    listed = re.findall(r"^│ ([a-z]+)  ", said, re.M)
    assert listed[:3] == ["run", "plan", "data"]
    group = typer.main.get_command(cli.app)
    assert isinstance(group, typer.core.TyperGroup)
    assert {*listed} == {*group.commands} >= {"serve", "keys", "recipes", "doctor"}


def test_a_command_with_a_letter_wrong_is_told_the_right_one_once() -> None:
    said = CliRunner().invoke(cli.app, ["rnu"])
    assert said.exit_code == 2
    assert said.output.count("Did you mean 'run'?") == 1


def test_python_runs_the_package_as_the_command() -> None:
    words = (sys.executable, "-m", "fedloom")
    version = subprocess.run([*words, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout == f"fedloom {fedloom.__version__}\n"
    usage = subprocess.run([*words, "run"], capture_output=True, text=True, check=False)
    assert usage.returncode == 2
    assert usage.stderr.startswith("Usage: fedloom run ")


def test_a_second_run_takes_a_folder_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/a").mkdir(parents=True)
    assert new_folder("b", None) == Path("runs/b")
    assert new_folder("a", None) == Path("runs/a-2")


def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(
    typed: Typed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync, calls = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        # The files before the second checkpoint fit.
        if next(calls) >= 8:
            raise OSError(28, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = typed(
            f"run quickstart --out full {' '.join(SMALL)} run.rounds=3 run.baselines=[]", code=2
        )
    assert re.search(r"writing .* needs \d+ bytes and \d+ are free", said.replace("\n", " "))
    assert "Traceback" not in said
    assert "3 rounds" in typed("resume full")


def test_the_readmes_bytes_are_the_benchmarks() -> None:
    results = (README.parent / "benchmarks/results/flasc.md").read_text()
    told = re.search(r"<!-- flasc:begin -->(.*)<!-- flasc:end -->", README.read_text(), re.DOTALL)
    assert told
    rows = [line.split(" | ") for line in told[1].splitlines() if "±" in line]
    assert len(rows) == 6
    for _, fewer, match, loss in rows:
        (line,) = [
            line for line in results.splitlines() if f"| {match} |" in line and fewer in line
        ]
        assert f"| {loss.removesuffix(' |')} |" in line


def test_what_the_readme_says_our_wire_reveals_is_the_benchmarks() -> None:
    page = (README.parent / "benchmarks/results/audit.md").read_text()
    told = README.read_text().split("<!-- audit:begin -->")[1].split("<!-- audit:end -->")[0]
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in page.splitlines()]
    measured = {row[0]: row for row in cells if row}
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in told.splitlines() if "%" in line]
    assert len(rows) == 13
    for name, through, found, area in rows:
        assert measured[name][4:6] == [through, found]
        assert measured[name][7] == area
    # What the pages say falls does: with steps, sparsity, clients summed and noise.
    areas = {name: float(row[7].split()[0]) for name, row in measured.items() if "(0." in row[-1]}
    for kind in ("all weights", "LoRA r8"):
        steps = [areas[kind], *(areas[f"{kind}, {count} SGD steps"] for count in (4, 16))]
        assert steps == sorted(steps, reverse=True)
        assert areas[kind] > areas[f"{kind}, FLASC 1/4 up"]
        sums = [areas[kind], *(areas[f"{kind}, secure sum of {count}"] for count in (2, 8))]
        assert sums == sorted(sums, reverse=True)
    noises = [
        areas[f"all weights, mean of 4 clients, noise {noise} of the clip"]
        for noise in ("0", "0.02", "0.5")
    ]
    assert noises == sorted(noises, reverse=True)


def test_the_readmes_pooled_clusters_are_the_benchmarks() -> None:
    page = (README.parent / "benchmarks/results/pooling.md").read_text()
    told = README.read_text().split("<!-- pooling:begin -->")[1].split("<!-- pooling:end -->")[0]
    rows = [line.strip("| ").split(" | ")[1:] for line in told.splitlines() if "±" in line]
    assert len(rows) == 3
    for setting, cells in zip(("conflict", "own", "iid"), rows, strict=True):
        part = page.split(f"## {setting}\n")[1].split("\n## ")[0]
        for mode, cell in zip(("fedavg", "apart", "pooled"), cells, strict=True):
            assert f"\n| {mode} | 5 | {cell} |" in part


def test_the_readmes_languages_in_conflict_are_the_benchmarks() -> None:
    page = (README.parent / "benchmarks/results/real_conflict.md").read_text()
    head, *measured = (
        [c.strip() for c in line.split("|")[1:]]
        for line in page.splitlines()
        if line.startswith("| ")
    )
    told = README.read_text().split("<!-- conflict:begin -->")[1].split("<!-- conflict:end -->")[0]
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in told.splitlines() if "±" in line]
    assert len(rows) == 3
    for arm, loss, beside, chrf in rows:
        (line,) = [line for line in measured if line[0] == arm]
        found = dict(zip(head, line, strict=True))
        columns = ("seeds", "loss after", "beside one model, paired", "chrF")
        assert [found[name] for name in columns] == ["3", loss, beside, chrf]


def test_the_readmes_languages_are_the_benchmarks() -> None:
    folder = README.parent / "benchmarks/results"
    told = README.read_text().split("<!-- languages:begin -->")[1]
    told = told.split("<!-- languages:end -->")[0]
    modes = {"found": "auto", "by language": "oracle", "by chance": "random", "one model": "fedavg"}
    modes["alone"] = "local"
    rows = [line.split(" | ") for line in told.splitlines() if "±" in line]
    assert len(rows) == 2 * len(modes)
    for at, name in enumerate(["languages.md", "languages_xquad.md"]):
        page = (folder / name).read_text()
        (loss,) = re.findall(r"^loss \(.*?(?=\n\nFound)", page, re.M | re.S)
        for title, mean, worst in rows[at * len(modes) : (at + 1) * len(modes)]:
            (mode,) = [modes[key] for key in modes if key in title]
            (line,) = [line for line in loss.splitlines() if line.startswith(f"| {mode} |")]
            assert f"| {mean} | {worst.removesuffix(' |')} |" in line, title
    xquad = (folder / "languages_xquad.md").read_text().partition("\n\nchrf")[0]
    assert all(f"\n| {mode} | 5 | 0.000 ± 0.000 | 0.000" in xquad for mode in modes.values())
    recovered = {
        cells[0].removeprefix("| "): [cell.partition(",")[0] for cell in cells]
        for name in ("clusters.md", "clusters_xquad.md")
        for line in (folder / name).read_text().splitlines()
        if (cells := line.split(" | "))[0].startswith("| ")
    }
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if " of 20 " in line]
    assert len(rows) == 4
    for title, *counts in rows:
        measured = recovered[title.partition(" ")[0]]
        assert counts == [*measured[3:5], *measured[6:9]], title
    missed = re.findall(r"^- 20: .*", (folder / "clusters.md").read_text(), re.M)
    assert len(missed) == 1
    assert "not separable" in missed[0]
    pooled = (folder / "routing.md").read_text().split("## Clusters pooled\n")[1].split("\n## ")[0]
    pattern = r"^\| (answers|prompts) \| (\d+) \| (\d+) ± \d+ \| (\d+) ± \d+ \|"
    found = {(by, n): (right, named) for by, n, right, named in re.findall(pattern, pooled, re.M)}
    cases = [found[case] for case in (("answers", "16"), ("prompts", "16"), ("prompts", "1"))]
    (first, second, third), sure = zip(*cases, strict=True)
    told = " ".join(told.split())
    assert f"from 16 examples in {first} % of cases, from 16 prompts in {second} % and from" in told
    assert (
        f"one in {third} % (chance: 17 %), and are told how sure that is: on average {sure[0]},"
        in told
    )
    assert f"{sure[1]} and {sure[2]} % (`benchmarks" in told


def test_the_readmes_real_models_are_the_benchmarks() -> None:
    told = README.read_text().split("<!-- real:begin -->")[1].split("<!-- real:end -->")[0]
    folder = README.parent / "benchmarks/results"
    flasc, instructions, seeds = (
        [line.strip("| ").split(" | ") for line in (folder / name).read_text().splitlines()]
        for name in ("real_flasc.md", "real_instructions.md", "real_kseed.md")
    )
    rows = [line.strip("| ").split(" | ") for line in told.splitlines() if "±" in line]
    assert len(rows) == 11
    for arm, fewer, *measured in rows[:5]:
        (line,) = [line for line in flasc if line[0] == arm]
        assert line[1:3] == ["3", "0.688"]
        assert [line[-1], *line[3 : 3 + len(measured)]] == [fewer, *measured]
    for title, *measured in rows[5:7]:
        assert [title, "3", *measured] in [line[:6] for line in instructions]
    for arm, spent, *measured in rows[7:]:
        (line,) = [line for line in seeds if line[0] == arm]
        assert line[1:3] == ["3", "3.162"]
        assert [line[7], *line[3 : 3 + len(measured)]] == [spent, *measured]


def test_the_readmes_speed_is_the_benchmarks() -> None:
    results = (README.parent / "benchmarks/results/round.txt").read_text().split("\n\n\n")[0]
    table = README.read_text().split("<!-- round:begin -->")[1].split("<!-- round:end -->")[0]
    measured = [float(number) for number in re.findall(r" (\d+\.\d)  +\d+\.\d%", results)]
    told = [float(number) for number in re.findall(r"(\d+) ms", table)]
    assert len(told) == 5
    assert all(any(abs(number - said) <= 0.5 for number in measured) for said in told)
    ratios = re.findall(r"([\d.]+)×\)", table)
    assert all(f"%       {ratio}" in results for ratio in ratios)


def test_data_longer_than_the_model_is_refused_by_every_look_at_it(
    typed: Typed, tiny_folder: Path
) -> None:
    for command in ("data", "plan", "run"):
        said = typed(f"{command} quickstart model.name={tiny_folder} data.max_length=300", 2)
        assert "data.max_length must be at most 256, which is how many positions" in said


def test_data_says_how_the_directions_of_a_pool_are_drawn(
    typed: Typed, tiny_folder: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "split.png"
    said = typed(
        f"data fedkseed model.name={tiny_folder} data.num_examples=200 --picture {picture}", 0
    )
    assert "rebuild of the weights along 4,096 gaussian directions: " in said
