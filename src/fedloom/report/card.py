"""The README.md of an exported model: what it is, how it was made, how to load it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, Literal

from fedloom.core.protocols import ClientId
from fedloom.report.run_folder import Results, read_results
from fedloom.rounds.privacy import privacy_record
from fedloom.tracking.metric_format import human_bytes, shown

Form = Literal["peft", "lora", "vllm", "gguf-lora", "merged", "nf4", "gguf", "seeds"]
"""What is written of a model: an adapter of its own kind; one of tune: vera as LoRA; a LoRA that vLLM, or llama.cpp, reads as
it is meant; the whole model as a folder, such a one in NF4 again, or as a GGUF file; what makes it of the base model, in seed space."""
_NAMED = 8
"""Clients that are named; of more, the number."""


@dataclass(frozen=True, slots=True)
class Exported:
    """What lies in the folder of an exported model."""

    form: Form = "peft"
    """lora is peft, once it is written."""
    file: str = ""
    """What to load, where that is not the folder."""
    rank: int = 0
    """Of vllm: what `--max-lora-rank` must be at least."""
    note: str = ""
    """What its readers must know, in a sentence."""

    @property
    def is_whole(self) -> bool:
        """Return whether no base model is needed beside it."""
        return self.form in ("merged", "nf4", "gguf")


def model_card(
    folder: Path,
    *,
    adapter: str,
    clients: Sequence[ClientId],
    exported: Exported | None = None,
    gguf: str | None = None,
) -> str:
    """Return the Markdown of one exported model.

    Args:
        folder: The run directory.
        adapter: The name of the exported folder.
        clients: Who uses this model.
        exported: What lies there; an adapter, if not given.
        gguf: The GGUF file that the base model came from.
    """
    run, exported = read_results(folder), exported or Exported()
    base = str((run.recipe.get("model") or {}).get("name", ""))
    builtin, privacy = base.startswith("builtin:"), privacy_record(run.privacy, run.history)
    named = f"{base}/{gguf}" if gguf and not base.endswith(gguf) else base
    sections = [
        _head("" if base.endswith(".gguf") else base, exported, builtin=builtin),
        f"# {run.name}: {adapter}\n\n{_story(run, named, clients, exported)}",
        f"## Use\n\n{_use(base, exported, builtin=builtin, gguf=gguf, name=adapter)}",
        _metrics(run, clients),
        f"## Privacy\n\n{privacy['said']}" if privacy else "",
        f"## Recipe\n\n```yaml\n{run.recipe_text.strip()}\n```" if run.recipe_text else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _head(base: str, exported: Exported, *, builtin: bool) -> str:
    lines = [] if builtin or not base else [f"base_model: {base}"]
    library = _LIBRARY.get(exported.form, "fedloom")
    lines += [f"library_name: {library}", "pipeline_tag: text-generation"]
    return "\n".join(["---", *lines, "tags:", "- federated-learning", "- fedloom", "---"])


def _story(run: Results, base: str, clients: Sequence[ClientId], exported: Exported) -> str:
    kind = "A model" if exported.is_whole or exported.form == "seeds" else "An adapter"
    summary, data = run.summary, run.recipe.get("data") or {}
    version = run.environment.get("versions", {}).get("fedloom")
    rounds = int(max((line["round"] for line in run.history.lines), default=0))
    source = data.get("source") or run.manifest.get("source")
    algorithm = summary.get("algorithm")
    everybody = len(run.manifest.get("clients", {})) or summary.get("num_clients") or len(clients)
    who = f"all {everybody} clients"
    if len(clients) < everybody:
        few = len(clients) <= _NAMED
        who = ", ".join(clients) if few else f"{len(clients)} of {everybody} clients"
    sent = run.history.total("comm/upload_bytes") + run.history.total("comm/download_bytes")
    text = [
        f"{kind} of `{base}`" if base else kind,
        f"fine-tuned with fedloom {version}" if version else "fine-tuned with fedloom",
        f"by {algorithm}" if algorithm else "",
        f"over {everybody} clients whose data stayed with them",
        f"({source})" if source else "",
    ]
    first = " ".join(part for part in text if part)
    traffic = f", {human_bytes(sent)} of traffic" if sent else ""
    prompt = run.manifest.get("prompt")
    written = f" Prompt of its training data: {prompt}." if prompt else ""
    noted = f" {exported.note}" if exported.note else ""
    return f"{first}.\n{rounds} rounds{traffic}. It serves {who}.{written}{noted}"


_LIBRARY = {
    "peft": "peft",
    "lora": "peft",
    "vllm": "peft",
    "merged": "transformers",
    "nf4": "transformers",
} | dict.fromkeys(("gguf", "gguf-lora"), "gguf")


def _use(base: str, exported: Exported, *, builtin: bool, gguf: str | None, name: str) -> str:
    """Return the block that says how to load it: a command, or Python."""
    file, base, name = quote(exported.file), base or "BASE", quote(name)
    command = {
        "gguf": f"llama-server -m {file}",
        "gguf-lora": f"llama-server -m BASE.gguf --lora {file}  # the GGUF of {base}",
        "seeds": f"fedloom apply {file} {base} --out model",
        "vllm": f"vllm serve {base} --enable-lora --max-lora-rank {exported.rank} --lora-modules {name}=.",
    }.get(exported.form)
    if command is not None:
        return f"```bash\n{command}\n```"
    usage = _usage(base, whole=exported.is_whole, builtin=builtin, gguf=gguf)
    return f"```python\n{usage}\n```"


def _usage(base: str, *, whole: bool, builtin: bool, gguf: str | None) -> str:
    if whole:
        return "\n".join(
            [
                "from transformers import AutoModelForCausalLM, AutoTokenizer",
                "",
                'folder = "."  # this folder',
                "model = AutoModelForCausalLM.from_pretrained(folder)",
                "tokenizer = AutoTokenizer.from_pretrained(folder)",
            ]
        )
    load = [
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'base = "{base}"',
    ]
    if builtin:
        load = [
            "from peft import PeftModel",
            "",
            "from fedloom.models.build import ModelSettings, load_base",
            "",
            f'base = load_base(ModelSettings(name="{base}"))',
            'model = PeftModel.from_pretrained(base.model, ".")  # this folder',
            "tokenizer = base.tokenizer",
        ]
        return "\n".join(load)
    if gguf is not None:
        return "\n".join(_from_gguf(base, gguf, load[:2]))
    load += [
        'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), ".")',
        "tokenizer = AutoTokenizer.from_pretrained(base)",
    ]
    return "\n".join(load)


def _from_gguf(base: str, gguf: str, imports: list[str]) -> list[str]:
    """Return the lines that load a base from a GGUF file in a folder or in a Hub repository."""
    local = base.startswith((".", "/", "~")) or base.endswith(gguf)
    place = f'"{base.removesuffix(gguf).rstrip("/") or "."}"'
    where = [*imports, "", f"base = {place}"]
    if local:
        where = ["from pathlib import Path", "", *imports, "", f"base = Path({place}).expanduser()"]
    return [
        *where,
        f'file = "{gguf}"',
        'model = AutoModelForCausalLM.from_pretrained(base, gguf_file=file, dtype="float32")',
        'model = PeftModel.from_pretrained(model, ".")  # this folder',
        "tokenizer = AutoTokenizer.from_pretrained(base, gguf_file=file)",
    ]


def _metrics(run: Results, clients: Sequence[ClientId]) -> str:
    rows: list[str] = []
    for metric in map(run.metric, run.history.measured()):
        before, after = run.ends(metric.name)
        rows.append(f"| {metric.title} | {shown(metric, before)} | {shown(metric, after)} |")
    if not rows:
        return ""
    everybody: Any = run.manifest.get("clients", {})
    whose = "of all clients together" if len(clients) < len(everybody) else ""
    head = f"Means over the held-out data {whose}".strip()
    return "\n".join(
        ["## Results", "", f"{head}.", "", "| | before | after |", "|---|---:|---:|", *rows]
    )
