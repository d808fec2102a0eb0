"""Does it train, whatever the architecture: each either learns as plain PEFT would have it, or is refused in a sentence.

    python benchmarks/architectures.py [--only llama gpt2 ...]

Small models of random weights, from transformers' own configurations, with the bundled tokenizer. Each is tuned with
LoRA on all linear layers and on layers by name: one round of a cohort, an evaluation, an export, which plain PEFT then
loads. Its logits must be ours within 1e-4, and a cohort in one batch must be its clients one by one.
"""

import argparse
import os
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
os.environ |= {"TRANSFORMERS_VERBOSITY": "error"}

import torch

from fedloom import experiment
from fedloom.core.protocols import Fit, Job
from fedloom.core.randomness import derive
from fedloom.models.build import ModelSettings, load_tokenizer
from fedloom.models.hf_logging import quiet
from fedloom.recipe import load_recipe
from fedloom.results.chat import last_run
from fedloom.results.export import deliverables
from fedloom.rounds.session import Session, build
from timing import write_page

CLOSE = 1e-4
LENGTH = 96
SIZES: Mapping[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}
SMALL_EYE = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4, "mamba_chunk_size": 16}


@dataclass(frozen=True)
class Made:
    """A small model: what its configuration has beside SIZES, and layers of it by name."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ("q_proj", "v_proj")
    without: Sequence[str] = ()
    """Of SIZES, what its configuration has no room for."""


ARCHITECTURES: Mapping[str, Made] = {
    "llama": Made(),
    "qwen2": Made(),
    "qwen3": Made({"head_dim": 16}),
    "mistral": Made({"sliding_window": 16}),
    "gemma": Made({"head_dim": 16}),
    "gemma2": Made({"head_dim": 16, "sliding_window": 16}),
    "gemma3_text": Made({"head_dim": 16, "sliding_window": 16}),
    "gemma3": Made(
        {
            "text_config": {**SIZES, "head_dim": 16, "sliding_window": 16},
            "vision_config": SMALL_EYE,
            "mm_tokens_per_image": 4,
            "image_token_index": 3,
            "boi_token_index": 2,
            "eoi_token_index": 4,
        }
    ),
    "phi": Made(names=["q_proj", "fc1"]),
    "phi3": Made(names=["qkv_proj"]),
    "phimoe": Made({"num_local_experts": 4}),
    "gpt2": Made(names=["c_attn"]),
    "gpt_bigcode": Made(names=["c_attn"]),
    "gpt_neo": Made({"attention_types": [[["global", "local"], 1]], "window_size": 16}),
    "gpt_neox": Made(names=["query_key_value"]),
    "gptj": Made({"rotary_dim": 8}),
    "codegen": Made({"rotary_dim": 8}, names=["qkv_proj"]),
    "opt": Made({"word_embed_proj_dim": 64, "ffn_dim": 128}),
    "bloom": Made(names=["query_key_value"]),
    "falcon": Made(names=["query_key_value"]),
    "mpt": Made({"max_seq_len": LENGTH}, names=["Wqkv"]),
    "stablelm": Made(),
    "cohere": Made(),
    "cohere2": Made({"sliding_window": 16}),
    "olmo": Made(),
    "olmo2": Made(),
    "olmoe": Made({"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": Made(),
    "granitemoe": Made({"num_local_experts": 4, "num_experts_per_tok": 2}),
    "mixtral": Made({"num_local_experts": 4}),
    "qwen2_moe": Made({**EXPERTS, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": Made({**EXPERTS, "head_dim": 16}),
    "qwen3_next": Made(
        {
            **EXPERTS,
            "head_dim": 16,
            "shared_expert_intermediate_size": 32,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        }
    ),
    "deepseek_v2": Made(LATENT, names=["q_a_proj", "o_proj"]),
    "deepseek_v3": Made(LATENT, names=["q_a_proj", "o_proj"]),
    "llama4_text": Made(
        {
            "intermediate_size_mlp": 128,
            "num_local_experts": 4,
            "head_dim": 16,
            "attention_chunk_size": 16,
        }
    ),
    "llama4": Made(
        {
            "text_config": {
                **SIZES,
                "intermediate_size_mlp": 128,
                "num_local_experts": 4,
                "head_dim": 16,
                "attention_chunk_size": 16,
            },
            "vision_config": {
                **SMALL_EYE,
                "vision_output_dim": 64,
                "projector_input_dim": 64,
                "projector_output_dim": 64,
                "intermediate_size": 128,
            },
            "image_token_index": 3,
            "boi_token_index": 2,
            "eoi_token_index": 4,
        }
    ),
    "jamba": Made(
        {
            **MAMBA,
            "num_experts": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        without=["max_position_embeddings"],
    ),
    "mamba": Made({"state_size": 8}, names=["in_proj"]),
    "mamba2": Made(
        {"state_size": 8, "num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 16},
        names=["in_proj"],
        without=["num_attention_heads", "num_key_value_heads"],
    ),
    "falcon_mamba": Made({"state_size": 8}, names=["in_proj"]),
    "recurrent_gemma": Made(
        {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 64, "head_dim": 16}
    ),
    "rwkv": Made({"attention_hidden_size": 64}, names=["key", "value", "receptance"]),
    "bamba": Made(
        {**MAMBA, "mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
        names=["in_proj", "q_proj"],
    ),
    "zamba2": Made(
        {
            "layer_types": ["linear_attention", "hybrid"],
            "layers_block_type": ["linear_attention", "hybrid"],
            "attention_head_dim": 32,
            "mamba_d_state": 8,
            "mamba_ngroups": 1,
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "chunk_size": 16,
            "num_mem_blocks": 1,
            "adapter_rank": 4,
        },
        names=["in_proj", "q_proj"],
    ),
    "falcon_h1": Made(
        {**MAMBA, "mamba_d_ssm": 128, "mamba_n_heads": 8, "mamba_d_head": 16}, names=["in_proj"]
    ),
    "lfm2": Made({"layer_types": ["conv", "full_attention"]}, names=["in_proj", "q_proj"]),
    "starcoder2": Made({"sliding_window": 16}),
    "xglm": Made({"d_model": 64, "ffn_dim": 128, "num_layers": 2, "attention_heads": 4}),
    "biogpt": Made(),
    "ctrl": Made({"dff": 128}, names=["Wq", "Wv"]),
    "openai-gpt": Made(names=["c_attn"]),
    "nemotron": Made(),
    "smollm3": Made({"no_rope_layers": [1, 0]}),
    "glm": Made({"head_dim": 16}),
    "glm4": Made({"head_dim": 16}),
    "gpt_oss": Made(
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
    ),
    "ernie4_5_moe": Made({"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
    "modernbert-decoder": Made(names=["q_proj"]),
    "bart": Made(
        {
            "d_model": 64,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 64,
            "is_decoder": True,
            "is_encoder_decoder": False,
        },
        without=["hidden_size", "num_hidden_layers", "num_attention_heads"],
    ),
    "bert": Made(names=["query", "value"]),
    "roberta": Made({"max_position_embeddings": LENGTH + 2}, names=["query", "value"]),
    "roberta, is_decoder": Made(
        {"max_position_embeddings": LENGTH + 2, "is_decoder": True}, names=["query", "value"]
    ),
    "electra": Made({"embedding_size": 32}, names=["query", "value"]),
    "electra, is_decoder": Made(
        {"embedding_size": 32, "is_decoder": True}, names=["query", "value"]
    ),
    "xlnet": Made(
        {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128},
        names=["layer_1"],
        without=[*SIZES.keys() - {"vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"}],
    ),
    "xlm": Made({"emb_dim": 64, "n_layers": 2, "n_heads": 4}, names=["q_lin", "v_lin"]),
}
ODD = (
    "gemma3",
    "phimoe",
    "gpt_neo",
    "bloom",
    "llama4",
    "jamba",
    "rwkv",
    "zamba2",
    "bert",
    "electra, is_decoder",
)
"""Ten that stand for the others."""


@dataclass(frozen=True)
class Outcome:
    """What became of a model with one choice of layers."""

    said: str
    """Trained, refused or FAULT, and what is to be told of that."""
    left_frozen: str = ""

    @property
    def good(self) -> bool:
        """Return whether it trained as it should or was refused in a sentence."""
        return not self.said.startswith("FAULT")


def make_model(name: str, folder: Path) -> None:
    """Write a small random model with the bundled tokenizer into a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = ARCHITECTURES[name]
    sizes = {key: value for key, value in SIZES.items() if key not in made.without}
    kind = name.partition(",")[0]
    if "text_config" in made.settings:
        sizes = {key: value for key, value in sizes.items() if key.endswith("token_id")}
    with quiet(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **{**sizes, **made.settings})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        load_tokenizer(ModelSettings()).save_pretrained(folder)


def tried(name: str, model: Path, targets: str | Sequence[str], folder: Path) -> Outcome:
    """Train, measure, export and load again; whatever goes wrong is the outcome."""
    told = targets if isinstance(targets, str) else f"[{','.join(targets)}]"
    recipe = load_recipe(
        "quickstart",
        [
            f"name={name.partition(',')[0]}",
            f"model.name={model}",
            f"tune.lora.targets={told}",
            "tune.lora.rank=4",
            "data.num_examples=160",
            "data.num_clients=4",
            "data.partition=iid",
            f"data.max_length={LENGTH}",
            "local.steps=3",
            "evaluation.max_new_tokens=4",
            "run.rounds=1",
            "run.samples=2",
            "run.baselines=[]",
        ],
    )
    try:
        experiment.run(recipe, folder)
        session = build(recipe, folder)
        return Outcome(_checked(session, model, folder), session.space.left_frozen)
    except ValueError as error:
        said = str(error).replace(str(model), name)
        return Outcome(f"refused: {said}" if "\n" not in said else f"FAULT: not a sentence: {said}")
    except Exception:  # noqa: BLE001  # whatever it is, it is what is looked for
        return Outcome(f"FAULT: {traceback.format_exc().strip().splitlines()[-1]}")


def _checked(session: Session, model: Path, folder: Path) -> str:
    ((params, _),) = deliverables(session, last_run(session)).values()
    moved = sum(bool(tensor.any()) for name, tensor in params.items() if "lora_B" in name)
    asked = sum("lora_B" in name for name in params)
    faults = []
    far = _reloaded(session, model, folder / "adapters" / "global")
    if not far <= CLOSE:
        faults.append(f"plain PEFT differs by {far:.1e}")
    apart, batched = _apart(session)
    if not apart <= CLOSE:
        faults.append(f"a batch of clients differs by {apart:.1e}")
    if not moved:
        faults.append("nothing moved")
    way = "in one batch" if batched else "one by one"
    said = f"{moved} of {asked} layers moved, clients {way}, PEFT within {far:.0e}"
    return f"FAULT: {', '.join(faults)}; {said}" if faults else f"trained: {said}"


@torch.no_grad()
def _reloaded(session: Session, model: Path, adapter: Path) -> float:
    """Return by how much the logits of plain PEFT differ from ours."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ((params, _),) = deliverables(session, last_run(session)).values()
    session.space.load(params)
    rows = [shard.test[0].ids for shard in session.federation.shards.values() if shard.test][:2]
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(model)
        theirs = PeftModel.from_pretrained(base, str(adapter)).eval()
    far = [
        theirs(input_ids=row[None]).logits - session.base.model(input_ids=row[None]).logits
        for row in rows
    ]
    return max(float(difference.abs().max()) for difference in far)


def _apart(session: Session) -> tuple[float, bool]:
    """Return by how much two steps of clients in one batch differ from those one by one, and whether there is a batch."""
    from fedloom.client.cohort import Cohort

    trainer, start = session.trainer, session.space.start()
    if not isinstance(trainer, Cohort):
        return 0.0, False
    jobs = [Job(c, 1, derive(0, c), Fit(start, steps=2)) for c in session.learners]
    ends = zip(trainer.run(jobs), trainer.sequential.run(jobs), strict=True)
    return max(
        float((one.params[name] - other.params[name]).abs().max())
        for one, other in ends
        for name in start
    ), True


def outcomes(name: str) -> dict[str, Outcome]:
    """Return what becomes of an architecture with all linear layers, and with layers by name."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_model(name, model)
        return {
            kind: tried(name, model, targets, Path(folder) / f"run {at}")
            for at, (kind, targets) in enumerate(
                {"all-linear": "all-linear", "by name": ARCHITECTURES[name].names}.items()
            )
        }


def main() -> None:
    """Try them all, and write the page."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="*", default=[], choices=list(ARCHITECTURES))
    asked = parser.parse_args().only
    lines = ["| architecture | layers | outcome | left frozen |", "|---|---|---|---|"]
    counts = {"trained": 0, "refused": 0, "FAULT": 0}
    for name in asked or ARCHITECTURES:
        for kind, outcome in outcomes(name).items():
            named = kind if kind == "all-linear" else ", ".join(ARCHITECTURES[name].names)
            left = outcome.left_frozen.partition(": ")[2]
            lines.append(f"| {name} | {named} | {outcome.said} | {left} |".replace("*", r"\*"))
            print(lines[-1], flush=True)
            counts[outcome.said.partition(":")[0]] += 1
    summary = f"{counts['trained']} trained, {counts['refused']} refused in a sentence, {counts['FAULT']} at fault."
    print(summary)
    if not asked:
        table = "\n".join(lines)
        text = f"{(__doc__ or '').partition('--only')[2].partition(chr(10) * 2)[2].strip()}\n\n{summary}\n\n{table}"
        packages = ("torch", "transformers", "peft")
        write_page("architectures.md", "Architectures", text, packages=packages)


if __name__ == "__main__":
    main()
