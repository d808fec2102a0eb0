from pathlib import Path

import pytest
import transformers as t

from fedloom.models.build import ModelSettings
from fedloom.models.positions import check_length, positions_of

TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        (t.LlamaConfig(max_position_embeddings=77), 77),
        (t.GPT2Config(n_positions=77), 77),
        (t.GPTNeoConfig(max_position_embeddings=77), 77),
        (t.CTRLConfig(n_positions=77), 77),
        (t.OPTConfig(max_position_embeddings=77), 77),
        (t.XGLMConfig(max_position_embeddings=77), 77),
        (t.DbrxConfig(max_seq_len=77), 77),
        (t.RobertaConfig(max_position_embeddings=80, pad_token_id=1), 78),
        (t.XLMRobertaConfig(max_position_embeddings=80, pad_token_id=2), 77),
        (t.Gemma3Config(text_config={**TEXT, "max_position_embeddings": 77}), 77),
        (t.Llama4Config(text_config={"max_position_embeddings": 77}), 77),
        (t.BloomConfig(seq_length=77), None),
        (t.MptConfig(max_seq_len=77), None),
        (t.MptConfig(max_seq_len=77, attn_config={"alibi": False}), 77),
        (t.FalconConfig(max_position_embeddings=77, alibi=True), None),
        (t.FalconConfig(max_position_embeddings=77, alibi=False), 77),
        (t.MambaConfig(), None),
        (t.MambaConfig(max_position_embeddings=77), None),
        (t.Mamba2Config(), None),
        (t.RwkvConfig(context_length=77), None),
        (t.XLNetConfig(), None),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_model_tells_its_positions(config, positions):
    assert positions_of(config) == positions


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        ({"rope_type": "default"}, 100),
        ({"rope_type": "linear", "factor": 2.0}, 200),
        ({"rope_type": "dynamic", "factor": 4.0}, 400),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 50}, 200),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 50}, 100),
    ],
)
def test_scaled_rotary_positions_reach_further(rope, positions):
    config = t.LlamaConfig(max_position_embeddings=100, rope_parameters={**rope, "rope_theta": 1e4})
    assert positions_of(config) == positions


def test_rows_longer_than_the_model_are_refused_without_a_weight(tiny_folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_text((tiny_folder / "config.json").read_text())
    settings = ModelSettings(name=str(tmp_path))
    check_length(settings, 256)
    with pytest.raises(
        ValueError, match=r"data.max_length must be at most 256, .* positions .*, got 257"
    ):
        check_length(settings, 257)
