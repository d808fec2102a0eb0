"""Pages over runs as they are found: escaped, inside the folder, and with what to type where there is nothing."""

import io
import json
import logging
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tests.board.conftest import Make, add_round, client_of

from fedloom.board.app import Board
from fedloom.board.beside import beside
from fedloom.board.guard import Door
from fedloom.board.server import server
from fedloom.rounds.lock import held
from fedloom.tracking.run_log import RunLog

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>'


class Elements(HTMLParser):
    """Collects what could run."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts: list[str | None] = []
        self.handlers: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "script":
            self.scripts.append(dict(attrs).get("src"))
        self.handlers += [f"{tag} {name}" for name, _ in attrs if name.startswith("on")]
        self.handlers += [f"{tag} {v}" for _, v in attrs if (v or "").startswith("javascript:")]


def hostile(runs: Path) -> Path:
    """Give a run a name, clients, a metric, a log and sites that would run code where they are not escaped."""
    one = runs / "one"
    for file in ("clients.jsonl", "manifest.json"):
        text = (one / file).read_text()
        (one / file).write_text(text.replace("client-000", json.dumps(HOSTILE)[1:-1]))
    summary = json.loads((one / "summary.json").read_text())
    (one / "summary.json").write_text(json.dumps({**summary, "name": HOSTILE}))
    recipe = (
        f"name: {json.dumps(HOSTILE)}\nalgorithm: {json.dumps(HOSTILE)}\nevaluation:\n  metrics:\n"
        f"  - {{name: own, title: {json.dumps(HOSTILE)}, better: higher}}\n"
    )
    (one / "recipe.yaml").write_text(recipe)
    text = (one / "metrics.jsonl").read_text()
    (one / "metrics.jsonl").write_text(text.replace("test/rougeL", "test/own"))
    RunLog(one / "log.txt").write(f"round 1: {HOSTILE}\nis absent")
    record = {"connected": True, "download_bytes": 1, "upload_bytes": 1, "num_absent": 1}
    site = {HOSTILE: {**record, "last_absence": HOSTILE}}
    (one / "status.json").write_text(json.dumps({"sites": site}))
    (runs / "cut" / "failed.txt").write_text(HOSTILE)
    return one


def test_names_of_runs_clients_metrics_and_sites_and_the_log_run_nothing(runs: Path) -> None:
    hostile(runs)
    shutil.copytree(runs / "one", runs / "<b>bold")
    client = client_of(runs)
    pages = {
        url: client.get(url)
        for url in (
            *("/", "/run?run=one", "/run?run=cut", "/run?run=%3Cb%3Ebold", "/chat", "/compare"),
            *("/compare?run=one&run=deep/two", "/report?run=one", f"/run?run={HOSTILE}"),
        )
    }
    for url, answer in pages.items():
        found = Elements(answer.text)
        assert set(found.scripts) <= {"/board.js"}, url
        assert not found.handlers, url
        assert "&lt;" in answer.text, url
    assert "is absent" in pages["/run?run=one"].text
    assert pages["/run?run=one"].text.count("&lt;script&gt;") >= 4
    assert "&lt;b&gt;bold" in pages["/"].text


def test_a_report_is_shown_as_it_is_and_nothing_of_it_runs(runs: Path) -> None:
    (runs / "one" / "report.html").write_text("<h1>written</h1><script>alert(1)</script>")
    answer = client_of(runs).get("/report?run=one")
    assert answer.text.startswith("<h1>written")
    assert "sandbox" in answer.headers["content-security-policy"]
    assert "script-src" not in answer.headers["content-security-policy"]
    drawn = client_of(runs).get("/report?run=cut")
    assert "Test loss" in drawn.text
    assert not (runs / "cut" / "report.html").exists()


@pytest.mark.parametrize(
    "name", ["../secret", "one/../../secret", "/etc", "..%2fsecret", "one/", "", "deep", "linked"]
)
def test_no_name_leads_out_of_the_folder(runs: Path, fabricate: Make, name: str) -> None:
    secret = fabricate("secret", folder=runs.parent / "secret")
    (runs / "linked").symlink_to(secret)
    client = client_of(runs)
    for page in ("run", "report", "events"):
        assert client.get(f"/{page}", params={"run": name}).status_code == 404
    assert client.get("/compare", params={"run": ["one", name]}).status_code == 404
    asked = {"run": name, "model": "", "text": "?", "messages": []}
    assert client.post("/chat", json=asked).status_code == 404
    for path in ("/../pyproject.toml", "/board.js/../app.py", "/%2e%2e/app.py", "/pages/list"):
        assert client.get(path).status_code == 404


@pytest.mark.parametrize("file", ["metrics.jsonl", "report.html", "log.txt", "adapters"])
def test_a_link_in_a_run_that_leads_out_is_refused(runs: Path, file: str) -> None:
    outside, path = runs.parent / "outside", runs / "one" / file
    if path.exists():
        shutil.move(path, outside)
    else:
        outside.write_text("secret")
    path.symlink_to(outside)
    client = client_of(runs)
    for page in ("run", "report"):
        answer = client.get(f"/{page}?run=one")
        assert answer.status_code == 400
        assert f"{file} is a link that leads out of" in answer.text
        assert "secret" not in answer.text
    assert "is a link that leads out of" in client.get("/").text
    path.unlink()
    path.symlink_to(runs / "deep" / "two" / "metrics.jsonl")
    if file == "metrics.jsonl":
        assert client.get("/run?run=one").status_code == 200


def test_a_page_of_a_run_shows_curves_clients_absences_and_log(runs: Path) -> None:
    RunLog(runs / "cut" / "log.txt").write("round 2: client-001 is absent: it took too long")
    with held(runs / "cut"):
        page = client_of(runs).get("/run?run=cut").text
    for part in ("running", "2 of 9 rounds", "Train loss", "client-002", "4 client-rounds"):
        assert part in page, part
    assert "client-001 is absent: it took too long" in page
    assert page.count("<svg") > 3


def test_parts_change_with_the_files_alone(runs: Path) -> None:
    board = Board.of(runs)
    first, again = board.live.of_run("cut"), board.live.of_run("cut")
    assert first == again
    add_round(runs / "cut", 3, **{"train/loss": 0.5, "server/epsilon": 1.25})
    later = board.live.of_run("cut")
    changed = {name for name in first if first[name] != later[name]}
    assert changed == {"state", "learning", "who"} - (
        {"who"} if first["who"] == later["who"] else set()
    )
    assert "epsilon is 1.25" in later["learning"]


def test_chosen_runs_stand_beside_each_other_with_the_settings_that_differ(runs: Path) -> None:
    shutil.copytree(runs / "cut", runs / "cat")
    text = (runs / "cat" / "recipe.yaml").read_text()
    (runs / "cat" / "recipe.yaml").write_text(text.replace("steps: 7", "steps: 8, lr: [1, x]"))
    found = beside([runs / "cut", runs / "cat"], None)
    assert found["settings"] == [("local.lr", ["\u2013", '[1, "x"]']), ("local.steps", ["7", "8"])]
    assert ("train/loss", "Train loss") in found["metrics"]
    client = client_of(runs)
    page = client.get("/compare?run=cut&run=cat&metric=train/loss").text
    assert "Train loss of 2 runs" in page
    assert page.count("<svg") == 2
    assert "local.steps" in page
    refused = client.get("/compare?run=cut&run=cat&metric=nonsense")
    assert "must be one that all runs have" in refused.text


def test_where_there_is_nothing_it_says_what_to_type(tmp_path: Path) -> None:
    folder = tmp_path / "my runs"
    folder.mkdir()
    client = client_of(folder)
    for page in ("/", "/compare", "/chat"):
        text = client.get(page).text
        assert f"fedloom run quickstart --out &#39;{folder}/quickstart&#39;" in text
    with pytest.raises(ValueError, match="does not exist: give the folder that holds runs"):
        Board.of(tmp_path / "nowhere")


def test_the_folder_of_a_server_that_waits_and_of_a_run_without_records_has_a_page(
    tmp_path: Path,
) -> None:
    (tmp_path / "listen.json").write_text("{}")
    with held(tmp_path):
        page = client_of(tmp_path).get("/run").text
    assert "waiting for sites" in page
    assert "There is none" in page


def test_a_board_leaves_the_logging_of_its_process_alone(runs: Path) -> None:
    class Closing(logging.StreamHandler[io.StringIO]):
        def close(self) -> None:
            self.stream.close()
            super().close()

    theirs = Closing(io.StringIO())
    server(Board.of(runs), Door("127.0.0.1"))
    assert not theirs.stream.closed
