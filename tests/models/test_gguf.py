import errno
import fcntl
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import psutil
import pytest
import torch
from tests.models.gguf_files import TEMPLATE, TOKENS, write_gguf

from fedloom.models import gguf as reader
from fedloom.models.build import ModelSettings, fingerprint, load_base, load_tokenizer
from fedloom.models.identity import identity


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder of converted models."""
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "cache"))
    return reader.cache()


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that grows by a file with each conversion."""
    done: list[Path] = []
    convert = reader._convert

    def counted(file: Path, *rest: Any) -> None:
        done.append(file)
        convert(file, *rest)

    monkeypatch.setattr(reader, "_convert", counted)
    return done


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_base(ModelSettings(name=str(path)))
    assert "\n" not in str(caught.value)


def test_a_model_answers_as_the_one_it_was_written_from(gguf_llama, tmp_path, cache):
    base = load_base(ModelSettings(name=str(write_gguf(tmp_path / "a.gguf", gguf_llama))))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, gguf_llama(ids).logits)
    assert base.gguf == "a.gguf"
    assert base.holds == "llama, 37,472 parameters as F32"


def test_tokenizer_template_and_ends_are_the_files(gguf_llama, tmp_path, cache):
    file = write_gguf(tmp_path / "a.gguf", gguf_llama, tokenizer__ggml__eot_token_id=3)
    base = load_base(ModelSettings(name=str(file)))
    text = "hello wörld 12 <turn>"
    ids = base.tokenizer(text).input_ids
    assert base.tokenizer.decode(ids) == text
    assert (ids[0], ids[-1]) == (TOKENS.index("hell"), TOKENS.index("<turn>"))
    assert base.tokenizer.chat_template == TEMPLATE
    assert len(base.tokenizer) == len(TOKENS)  # GPT-2's end of text is none of them
    assert base.model.generation_config.eos_token_id == [2, 3]


def test_a_file_and_its_converted_folder_are_one_model(tiny_gguf, cache, conversions):
    settings = ModelSettings(name=str(tiny_gguf))
    base = load_base(settings)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    as_folder = load_base(ModelSettings(name=str(folder)))
    assert fingerprint(base.model) == fingerprint(as_folder.model)
    assert identity(base) == identity(as_folder)
    assert as_folder.gguf is None
    assert base.model.dtype == torch.float32
    half = load_base(ModelSettings(name=str(tiny_gguf), dtype="bfloat16")).model
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert len(conversions) == 1


def test_it_is_known_by_its_bytes_wherever_it_lies(tiny_gguf, tmp_path, cache, conversions):
    for name in ("x.gguf", "sub/y.GGUF"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        load_tokenizer(ModelSettings(name=str(shutil.copy(tiny_gguf, tmp_path / name))))
    assert len(conversions) == 1


def test_a_file_that_was_written_anew_is_another_model(gguf_llama, tiny_llama, tmp_path, cache):
    settings = ModelSettings(name=str(write_gguf(tmp_path / "a.gguf", gguf_llama)))
    before = fingerprint(load_base(settings).model)
    write_gguf(tmp_path / "a.gguf", tiny_llama(seed=1, vocab=len(TOKENS)))
    assert fingerprint(load_base(settings).model) != before


def test_nothing_beside_the_file_has_a_say(tiny_gguf, tiny_tokenizer, tmp_path, cache, monkeypatch):
    expected = load_base(ModelSettings(name=str(tiny_gguf)))
    shutil.rmtree(cache)
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    shutil.copy(tiny_gguf, tmp_path / "other" / "a.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"another file of that name")
    base = load_base(ModelSettings(name="other"))
    assert identity(base) == identity(expected)
    assert fingerprint(base.model) == fingerprint(expected.model)


def test_of_processes_that_come_at_once_one_converts(tiny_gguf, cache, conversions):
    left = cache / f"{'0' * 32}.part0"
    left.mkdir(parents=True)
    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: reader.converted(tiny_gguf, "a"), range(3)))
    assert len(set(folders)) == len(conversions) == 1
    assert left.is_dir()  # somebody else's


def test_what_a_killed_process_left_is_no_model(tiny_gguf, cache, conversions):
    folder = reader.converted(tiny_gguf, "a")
    left = folder.rename(folder.with_name(f"{folder.name}.part7"))
    assert reader.converted(tiny_gguf, "a") == folder
    assert len(conversions) == 2
    assert not left.exists()


def test_without_locks_whoever_is_second_takes_the_firsts(tiny_gguf, cache, monkeypatch):
    def no_locks(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    convert, first = reader._convert, list[Path]()

    def meanwhile(file: Path, header: Any, folder: Path, name: str) -> None:
        convert(file, header, folder, name)
        if not first:
            first.append(folder)
            first.append(reader.converted(file, name))

    monkeypatch.setattr(reader, "_convert", meanwhile)
    assert reader.converted(tiny_gguf, "a") == first[1]
    assert [path for path in cache.iterdir() if path.is_dir()] == [first[1]]


def test_a_folder_holds_one_or_says_which(tiny_gguf, tmp_path):
    shutil.copy(tiny_gguf, tmp_path / "a.gguf")
    assert load_base(ModelSettings(name=str(tmp_path))).gguf == "a.gguf"
    shutil.copy(tiny_gguf, tmp_path / "b.gguf")
    refused(tmp_path, r"holds a.gguf, b.gguf: choose one with model.file")
    assert load_base(ModelSettings(name=str(tmp_path), file="b.gguf")).gguf == "b.gguf"


def test_a_folder_of_safetensors_is_those_unless_a_file_is_named(tiny_folder, tiny_gguf, tmp_path):
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "both"))
    shutil.copy(tiny_gguf, folder)
    assert load_base(ModelSettings(name=str(folder))).gguf is None
    assert load_base(ModelSettings(name=str(folder), file="tiny.gguf")).gguf == "tiny.gguf"


def test_a_hub_repository_is_asked_for_its_file(tiny_gguf, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    blob = shutil.copy(tiny_gguf, repository / "blob")  # the Hub's names are links
    (snapshot / "tiny.gguf").symlink_to(blob)
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = load_base(ModelSettings(name="org/tiny", file="tiny.gguf"))
    assert (base.name, base.gguf) == ("org/tiny", "tiny.gguf")
    assert base.model.config._commit_hash == commit
    assert base.described() == "org/tiny (tiny.gguf): llama, 37,472 parameters as Q8_0 with F32"
    with pytest.raises(ValueError, match=r"model.file no.gguf cannot be had from org/tiny") as seen:
        load_base(ModelSettings(name="org/tiny", file="no.gguf"))
    assert "\n" not in str(seen.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "./no.gguf"}, r"there is no file ./no.gguf; one on the Hub is named by"),
        ({"name": "{file}", "file": "a.gguf"}, r"model.file must be left out .* got a.gguf with"),
        (
            {"name": "builtin:tiny", "file": "a.gguf"},
            r"model.file must be left out .* builtin:tiny",
        ),
        ({"name": "{folder}", "file": "a.gguf"}, r"model.file a.gguf is not in .* tiny.gguf"),
        ({"name": "org/x", "file": "a.txt"}, r"model.file must be the name of a GGUF file, got"),
    ],
)
def test_a_file_that_is_meant_otherwise_says_so(tiny_gguf, settings, message):
    at = {"file": tiny_gguf, "folder": tiny_gguf.parent}
    with pytest.raises(ValueError, match=message):
        load_base(ModelSettings(**{k: v.format(**at) for k, v in settings.items()}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split__count": 2}, r"is one of 2 parts of a split GGUF: join them with `llama-gguf-spl"),
        ({"architecture": "clip"}, r"is a GGUF of no language model \(clip\)"),
        ({"general__type": "mmproj"}, r"is a GGUF of no language model \(mmproj\)"),
        ({"general__type": "adapter"}, r"is a GGUF of no language model \(adapter\)"),
        (
            {"architecture": "made-up"},
            r"of architecture made-up, which transformers .* cannot read",
        ),
        ({"tokenizer": ""}, r"holds no tokenizer: give a GGUF with one, or a folder"),
        ({"tokenizer": "no_vocab"}, r"holds no tokenizer"),
        (
            {"tokenizer": "rwkv"},
            r"has no tokenizer that transformers .* \(tokenizer.ggml.model rwkv",
        ),
        ({"weights": False}, r"holds a tokenizer and no weights"),
    ],
)
def test_a_file_of_another_kind_is_named(gguf_llama, tmp_path, cache, changes, message):
    refused(write_gguf(tmp_path / "a.gguf", gguf_llama, **changes), message)
    assert not [path for path in cache.glob("*") if path.is_dir()]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda data: data[:-100],
            r"is truncated: it has [\d,]+ of [\d,]+ bytes; get the file again",
        ),
        (lambda data: data[:3000], r"ends or is damaged within its header: get the file again"),
        (lambda data: b"", r"is no GGUF file: give a file that ends in .gguf"),
        (lambda data: b"GGML" + data[4:], r"is no GGUF file"),
        (lambda data: data[:4] + data[7:3:-1] + data[8:], r"is a GGUF of version 50331648, and"),
    ],
    ids=["end", "header", "empty", "magic", "big-endian"],
)
def test_a_damaged_file_is_one_sentence(
    tiny_gguf, tmp_path, damage: Callable[[bytes], bytes], message
):
    path = tmp_path / "a.gguf"
    path.write_bytes(damage(tiny_gguf.read_bytes()))
    refused(path, rf"model.name {path} {message}")


def test_a_part_by_its_name_is_a_part(tiny_gguf, tmp_path):
    refused(Path(shutil.copy(tiny_gguf, tmp_path / "a-00002-of-00003.gguf")), r"one of 3 parts")


def test_a_file_that_lacks_a_layer_is_no_whole_model(gguf_llama, tmp_path):
    gguf_llama.config.num_hidden_layers += 1
    try:
        file = write_gguf(tmp_path / "a.gguf", gguf_llama)
    finally:
        gguf_llama.config.num_hidden_layers -= 1
    refused(file, r"model.layers.2\S+ and 8 more of \d+ tensors are in none of its files")


def test_types_that_are_not_known_yet_are_named(tiny_gguf, tmp_path, monkeypatch):
    known = SimpleNamespace(F32=gguf.GGMLQuantizationType.F32)
    monkeypatch.setattr(
        gguf, "GGMLQuantizationType", type("Known", (), {"__iter__": lambda _: iter([known.F32])})()
    )
    path = Path(shutil.copy(tiny_gguf, tmp_path / "new.gguf"))
    refused(path, r"as type 8, which the package gguf here does not know")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "disk_usage",
            r"needs 0.0 GB of room in .* 0.0 GB are free: set FEDLOOM_CACHE to a larger",
        ),
        ("virtual_memory", r"needs 0.0 GB of memory to be converted .* choose a smaller model"),
    ],
)
def test_where_there_is_no_room_nothing_is_begun(tiny_gguf, cache, monkeypatch, what, message):
    none = SimpleNamespace(free=0, available=0)
    place = shutil if what == "disk_usage" else psutil
    monkeypatch.setattr(place, what, lambda *_: none)
    refused(tiny_gguf, message)


def test_a_cache_that_cannot_be_written_to_is_named(tiny_gguf, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDLOOM_CACHE", str(tmp_path / "file"))
    refused(tiny_gguf, r"cannot be converted into .* \(Not a directory\): set FEDLOOM_CACHE to")


def test_what_is_converted_is_said_and_no_more(tiny_gguf, cache, capfd):
    load_base(ModelSettings(name=str(tiny_gguf)))
    out, said = capfd.readouterr()
    assert out == ""
    assert said.startswith(f"{tiny_gguf} is converted, once, into {cache}")
    assert said.count("\n") == 1
    load_base(ModelSettings(name=str(tiny_gguf)))
    assert capfd.readouterr() == ("", "")
