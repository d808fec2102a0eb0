"""Train the tokenizer and the weights of the bundled model `builtin:tiny` from scratch.

    python scripts/pretrain_tiny.py --text FOLDER --minutes 25

Text files hold documents separated by a blank line. The built-in corpus gives the rest: statements of facts, never
questions or instructions, so that fine-tuning has something to update_clusters. With `--tokens` the result depends on the seed
and the machine's arithmetic only; with `--minutes` also on its speed.
"""

import argparse
import copy
import json
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, distributed, multiprocessing
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedloom.core.randomness import derive
from fedloom.data import polyglot

END, PAD = "<|endoftext|>", "<|pad|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
DEFAULT_OUT = Path(__file__).parents[1] / "src/fedloom/models/tiny"
MAX_POSITIONS = 1024

# A turn is a role token, a space, the text and the end token. The space makes an answer's first word the same token
# as in running text, and special tokens at every boundary keep a prompt's tokens a prefix of the whole's.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role must be system, user or assistant, got ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' -}}"
    "{%- if message['role'] == 'assistant' -%}"
    "{%- generation -%}{{- ' ' + message['content'] + '<|endoftext|>' -}}{%- endgeneration -%}"
    "{%- else -%}"
    "{{- ' ' + message['content'] + '<|endoftext|>' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


@dataclass(frozen=True)
class Corpus:
    """Documents by source; the held-out ones are never trained on."""

    train: dict[str, list[str]]
    heldout: dict[str, list[str]]


def read_corpus(paths: list[Path], num_sentences: int, seed: int) -> Corpus:
    """Read the text files and write the statements of the built-in corpus."""
    files = [f for path in paths for f in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]
    train, heldout = {}, {}
    for file in files:
        documents = [d for d in file.read_text(encoding="utf-8").split("\n\n") if d.strip()]
        # The same split for every seed, so that a later stage never trains on what is held out.
        random.Random(derive(0, "split", file.stem)).shuffle(documents)
        num_heldout = max(1, len(documents) // 100)
        heldout[file.stem], train[file.stem] = documents[:num_heldout], documents[num_heldout:]
    train["polyglot"] = polyglot.declarative(num_sentences, derive(seed, "train"))
    for language in polyglot.LANGUAGES:
        statements = polyglot.declarative(500, derive(seed, "heldout", language), [language])
        heldout[f"polyglot-{language}"] = statements
    return Corpus(train, heldout)


def train_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """Train byte-level BPE: any text is a sequence of known tokens and comes back unchanged."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in (END, PAD, *ROLES)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = [
        d
        for name, documents in corpus.train.items()
        for d in documents[: 60_000 if name == "polyglot" else 12_000]
    ]
    bpe.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=list(ROLES),
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def pack(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, length: int, seed: int
) -> tuple[Tensor, dict[str, int]]:
    """Shuffle all documents, join them with end tokens and cut blocks: (num_blocks, length + 1) int64."""
    documents = [(name, d) for name, group in corpus.train.items() for d in group]
    random.Random(derive(seed, "order")).shuffle(documents)
    ids: list[int] = []
    counts = dict.fromkeys(corpus.train, 0)
    for start in range(0, len(documents), 20_000):
        batch = documents[start : start + 20_000]
        encoded = tokenizer.backend_tokenizer.encode_batch_fast([d for _, d in batch])
        for (name, _), encoding in zip(batch, encoded, strict=True):
            ids += [*encoding.ids, tokenizer.eos_token_id]
            counts[name] += len(encoding.ids) + 1
    flat = torch.from_numpy(np.asarray(ids, dtype=np.int64))
    num_blocks = (len(flat) - 1) // length
    starts = torch.arange(num_blocks)[:, None] * length
    return flat[starts + torch.arange(length + 1)], counts


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(derive(seed, "weights"))
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            intermediate_size=688,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=0.02,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def batches(blocks: Tensor, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches for ever, each epoch in an order of its own."""
    epoch = 0
    while True:
        order = torch.randperm(
            len(blocks), generator=torch.Generator().manual_seed(derive(seed, "epoch", epoch))
        )
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield blocks[order[start : start + batch_size]]
        epoch += 1


def bits_per_byte(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, documents: list[str]
) -> float:
    """Return the mean bits the model needs for a byte of text, each document on its own."""
    bits, num_bytes = 0.0, 0
    model.eval()
    for start in range(0, len(documents), 32):
        group = documents[start : start + 32]
        ids = [[tokenizer.eos_token_id, *tokenizer(d)["input_ids"]][:512] for d in group]
        width = max(map(len, ids))
        inputs = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row in ids])
        labels = torch.tensor([row + [-100] * (width - len(row)) for row in ids])
        with torch.inference_mode():
            logits = model(input_ids=inputs).logits.float()
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1),
            labels[:, 1:].flatten(),
            ignore_index=-100,
            reduction="sum",
        )
        bits += loss.item() / math.log(2)
        num_bytes += sum(len(tokenizer.decode(row[1:]).encode()) for row in ids)
    model.train()
    return bits / num_bytes


def next_token_loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    """Return the mean loss over a batch of blocks, (batch, length + 1) int64."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), batch[:, 1:].flatten()
        )


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices inside the layers and AdamW for embeddings and norms."""
    inside = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or "embed" in name]
    # The update of Muon has about the size of AdamW's at the same rate; small layers bear twice that.
    muon = torch.optim.Muon(inside, lr=2 * rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)]


def train(
    rank: int, model: LlamaForCausalLM, blocks: Tensor, arguments: argparse.Namespace, meeting: str
) -> dict[str, Any]:
    """Train under a schedule that ends with the budget; the same on every rank, each with its share of a batch.

    A rank has one thread and meets the others once a step, which loses little time on a busy machine.
    """
    torch.set_num_threads(1)
    ranks = arguments.processes
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=ranks)
    used = optimizers(model, arguments.lr)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in used]
    parameters = list(model.parameters())
    step_loss = torch.compile(next_token_loss) if arguments.compile else next_token_loss
    tokens_per_step = arguments.batch_size * arguments.length
    start, steps, done, mean_loss = time.perf_counter(), 0, 0.0, math.nan
    model.train()
    for batch in batches(blocks, arguments.batch_size, arguments.seed):
        loss = step_loss(model, batch[rank::ranks])
        loss.backward()
        if arguments.tokens:
            now = (steps + 1) * tokens_per_step / arguments.tokens
        else:
            now = (time.perf_counter() - start) / 60 / arguments.minutes
        # One message a step: all gradients, the loss and the clock, so that all ranks stop together.
        message = torch.cat(
            [p.grad.flatten() for p in parameters] + [torch.tensor([loss.item(), now])]
        )
        distributed.all_reduce(message)
        message /= ranks
        gradients = message[:-2].split([p.numel() for p in parameters])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = min(1.0, (steps + 1) / arguments.warmup, 0.01 + (1 - min(done, 1.0)) / 0.6)
        for optimizer, peak in zip(used, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        steps, done = steps + 1, message[-1].item()
        mean_loss = (
            message[-2].item() if steps == 1 else 0.98 * mean_loss + 0.02 * message[-2].item()
        )
        if rank == 0 and steps % 50 == 0:
            speed = steps * tokens_per_step / (time.perf_counter() - start)
            print(
                f"{done:6.1%} step {steps} loss {mean_loss:.3f} rate {rate:.3f}"
                f" tokens {steps * tokens_per_step / 1e6:.2f}M speed {speed:.0f}/s",
                flush=True,
            )
        if done >= 1:
            break
    distributed.destroy_process_group()
    minutes = (time.perf_counter() - start) / 60
    return {"steps": steps, "tokens": steps * tokens_per_step, "minutes": round(minutes, 1)}


def train_together(
    model: LlamaForCausalLM, blocks: Tensor, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Train on several processes, this one the first."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/meeting"
        others = [
            multiprocessing.get_context("spawn").Process(
                target=train, args=(rank, copy.deepcopy(model), blocks, arguments, meeting)
            )
            for rank in range(1, arguments.processes)
        ]
        for process in others:
            process.start()
        outcome = train(0, model, blocks, arguments, meeting)
        for process in others:
            process.join()
    return outcome


def save(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, notes: dict[str, str], out: Path
) -> None:
    """Write the folder beside its place, then move the files over one by one."""
    staging = out.with_name(out.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    model.to(torch.bfloat16).save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    for name, text in notes.items():
        (staging / name).write_text(text.rstrip() + "\n", encoding="utf-8")
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted(staging.iterdir()):
        file.chmod(0o644)
        os.replace(file, out / file.name)
    staging.rmdir()


def model_card(
    model: LlamaForCausalLM, stages: list[dict[str, Any]], bits: dict[str, float]
) -> str:
    """Return the README that tells what the model is and where it comes from."""
    names = list(dict.fromkeys(name for stage in stages for name in stage["at_hand"]))
    rows = {
        "steps": [stage["steps"] for stage in stages],
        "tokens": [f"{stage['tokens'] / 1e6:.1f} M" for stage in stages],
        "minutes": [stage["minutes"] for stage in stages],
        "peak rate": [stage["rate"] for stage in stages],
        "seed": [stage["seed"] for stage in stages],
    }
    for name in names:
        shares = [
            stage["at_hand"].get(name, 0) / sum(stage["at_hand"].values()) for stage in stages
        ]
        rows[f"share of {name}"] = [f"{share:.1%}" for share in shares]
    table = ["| | " + " | ".join(f"stage {k + 1}" for k in range(len(stages))) + " |"]
    table.append("|---" * (len(stages) + 1) + "|")
    table += [f"| {name} | " + " | ".join(map(str, cells)) + " |" for name, cells in rows.items()]
    template = (Path(__file__).parent / "pretrain_tiny_card.md").read_text(encoding="utf-8")
    return template.format(
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M",
        vocab_size=model.config.vocab_size,
        stages="\n".join(table),
        notes="\n".join(stage["note"] for stage in stages if stage["note"]),
        bits="\n".join(f"| {name} | {value:.3f} |" for name, value in bits.items()),
        batch_size=stages[-1]["batch_size"],
        length=stages[-1]["length"],
        machine=stages[-1]["machine"],
    )


def main() -> None:
    """Parse the command line, train, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--text", type=Path, nargs="*", default=[], help="files, or folders of *.txt"
    )
    parser.add_argument("--start", type=Path, help="folder of an earlier stage to go on from")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--minutes", type=float)
    budget.add_argument("--tokens", type=float)
    parser.add_argument("--sentences", type=int, default=500_000, help="of the built-in corpus")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--batch-size", type=int, default=16, help="blocks a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=int, default=50, help="steps")
    parser.add_argument("--compile", action="store_true", help="faster steps after half a minute")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--note", default="", help="what the card says of this stage")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.processes)

    start = time.perf_counter()
    corpus = read_corpus(arguments.text, arguments.sentences, arguments.seed)
    stages: list[dict[str, Any]] = []
    if arguments.start:
        tokenizer = AutoTokenizer.from_pretrained(arguments.start)
        model = LlamaForCausalLM.from_pretrained(arguments.start, dtype=torch.float32)
        stages = json.loads((arguments.start / "training.json").read_text(encoding="utf-8"))
    else:
        tokenizer = train_tokenizer(corpus, arguments.vocab_size)
        model = build_model(tokenizer, arguments.seed)
    blocks, counts = pack(corpus, tokenizer, arguments.length, arguments.seed)
    print(json.dumps({"blocks": len(blocks), "tokens": counts, "vocabulary": len(tokenizer)}))
    print(f"prepared in {time.perf_counter() - start:.0f} s", flush=True)

    stages.append(
        train_together(model, blocks, arguments)
        | {
            "at_hand": counts,
            "batch_size": arguments.batch_size,
            "length": arguments.length,
            "rate": arguments.lr,
            "seed": arguments.seed,
            "note": arguments.note,
            "machine": f"{platform.machine()} CPU, {arguments.processes} processes of one thread,"
            f" torch {torch.__version__}",
        }
    )
    model.to(torch.bfloat16)
    bits = {name: bits_per_byte(model, tokenizer, d[:500]) for name, d in corpus.heldout.items()}
    print(json.dumps(stages[-1] | {"bits_per_byte": bits}, indent=1))
    notes = {
        "README.md": model_card(model, stages, bits),
        "training.json": json.dumps(stages, indent=1),
    }
    save(model, tokenizer, notes, arguments.out)


if __name__ == "__main__":
    main()
