"""A model's tokenizer as a GGUF file's metadata, where it is one of bytes and pairs whose kind llama.cpp has a name for."""

import json
from pathlib import Path
from typing import Any

_LETTERS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KINDS: dict[tuple[tuple[str, object], ...], str] = {
    (("ByteLevel", True),): "gpt-2",
    (("Digits", True), ("ByteLevel", True)): "smollm",
    (("Split", _LETTERS % ""), ("ByteLevel", False)): "qwen2",
    (("Split", _LETTERS % "{1,3}"), ("ByteLevel", False)): "llama-bpe",
}
"""How text is cut before pairs are merged -> what llama.cpp calls that."""
_WHOLE_WORDS = ("llama-bpe",)
"""Kinds for which llama.cpp takes a word that is a token as that token, whatever the pairs say."""


def add_tokenizer(writer: Any, folder: Path, rows: int) -> None:
    """Add a saved tokenizer to a writer: tokens, pairs, special tokens, ends and chat template.

    Args:
        writer: gguf's.
        folder: With tokenizer.json and what stands beside it.
        rows: Of the embedding; those without a token get one that is never used.

    Raises:
        ValueError: where the tokenizer is of another kind.
    """
    from gguf import SpecialVocab, TokenType

    content = _json(folder / "tokenizer.json")
    kind = _kind(content)
    tokens = [f"[PAD{at}]" for at in range(rows)]
    types = [TokenType.UNUSED] * rows
    for token, at in content["model"]["vocab"].items():
        tokens[at], types[at] = token, TokenType.NORMAL
    for added in content["added_tokens"]:
        special = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], types[added["id"]] = added["content"], special
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    vocabulary = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    for end, adds in _ends_added(folder).items():
        vocabulary.add_special_token.setdefault(end, adds)
    vocabulary.add_to_gguf(writer, quiet=True)
    ends = _json(folder / "generation_config.json").get("eos_token_id")
    last = vocabulary.special_token_ids.get("eos")
    turns = [end for end in ends if end != last] if isinstance(ends, list) else []
    if turns:
        writer.add_eot_token_id(turns[0])


def _kind(content: dict[str, Any]) -> str:
    """Return what llama.cpp calls the way in which text is cut before pairs are merged."""
    model, cut = content.get("model") or {}, content.get("pre_tokenizer") or {}
    normalizer = (content.get("normalizer") or {}).get("type")
    parts = cut.get("pretokenizers", [cut])
    kind = _KINDS.get(tuple(map(_part, parts)))
    plain = model.get("type") == "BPE" and normalizer in (None, "NFC")
    whole = bool(model.get("ignore_merges")) == (kind in _WHOLE_WORDS)
    if kind is None or not (plain and whole):
        raise ValueError(
            f"a GGUF is written with tokenizers of kind {', '.join(_KINDS.values())}, and this model's is none of them: give"
            " the model as a GGUF file (model.name), or export with --for merged and convert that folder with llama.cpp's"
            " convert_hf_to_gguf.py"
        )
    return kind


def _part(step: dict[str, Any]) -> tuple[str, object]:
    name = str(step.get("type"))
    if name == "ByteLevel" and not step.get("add_prefix_space"):
        return name, step.get("use_regex", True)
    if name == "Digits":
        return name, step.get("individual_digits")
    if name == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return name, step["pattern"].get("Regex")
    return name, None


def _ends_added(folder: Path) -> dict[str, bool]:
    """Return whether the tokenizer puts its token of begin and of end around a text."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("a").input_ids
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    return {
        "bos": len(ids) > 1 and begin is not None and ids[0] == begin,
        "eos": len(ids) > 1 and end is not None and ids[-1] == end,
    }


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
