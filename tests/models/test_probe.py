import pytest
import torch
import transformers as t
from torch import nn

from fedloom.models.probe import asked, check_causal, keeps_padding_out, looks_ahead, plain_ids

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
ENCODERS = {
    "bert": (t.BertLMHeadModel, t.BertConfig),
    "roberta": (t.RobertaForCausalLM, t.RobertaConfig),
    "electra": (t.ElectraForCausalLM, t.ElectraConfig),
    "camembert": (t.CamembertForCausalLM, t.CamembertConfig),
    "roformer": (t.RoFormerForCausalLM, t.RoFormerConfig),
}


def made(kind, config, **settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(**{**SIZES, **settings})).eval().requires_grad_(False)


@pytest.mark.parametrize(("kind", "config"), ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_that_loads_as_a_causal_model_is_found_out(kind, config, dtype):
    model = made(kind, config).to(dtype)
    assert looks_ahead(model)
    with pytest.raises(ValueError, match=rf"but mine \({kind.__name__}\) sees the tokens after"):
        check_causal(model, "mine")


@pytest.mark.parametrize(("kind", "config"), ENCODERS.values(), ids=ENCODERS)
def test_the_same_as_a_decoder_is_causal(kind, config):
    check_causal(made(kind, config, is_decoder=True), "mine")


def test_a_model_of_permutations_looks_ahead():
    config = t.XLNetConfig(vocab_size=64, d_model=32, n_layer=2, n_head=2, d_inner=64)
    assert looks_ahead(t.XLNetLMHeadModel(config).eval().requires_grad_(False))


def test_a_prefix_that_sees_itself_whole_looks_ahead():
    settings = {**SIZES, "head_dim": 16, "num_key_value_heads": 2}
    model = t.Gemma3ForCausalLM(t.Gemma3TextConfig(**settings, use_bidirectional_attention=True))
    assert looks_ahead(model.eval().requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_llama_is_causal_in_every_type(tiny_llama, tiny_routed, dtype):
    for model in (tiny_llama(dtype=dtype), tiny_routed(dtype=dtype)):
        assert not looks_ahead(model)


@pytest.mark.parametrize(
    ("noise", "leak", "ahead"), [(1e-7, 0.0, False), (1e-7, 1e-3, True), (0.0, 1.0, True)]
)
def test_rounding_is_told_from_seeing(tiny_llama, noise, leak, ahead):
    """Products that round otherwise for other tokens move all places a little, without a gradient."""
    model = tiny_llama()
    forward = model.forward
    grid = nn.Parameter(torch.ones(()))

    def faulty(input_ids, use_cache=False):
        out = forward(input_ids=input_ids, use_cache=use_cache)
        with torch.no_grad():
            rounded = noise * input_ids[:, -1:, None].float()
        behind = model.model.embed_tokens(input_ids[:, -1:]).mean(-1, keepdim=True)
        out.logits = out.logits * (1 + rounded) + grid * leak * behind
        return out

    model.forward = faulty
    assert looks_ahead(model) is ahead


def test_a_model_that_draws_random_numbers_is_asked_with_the_same_ones(tiny_llama):
    model = tiny_llama()
    forward = model.forward

    def drawing(**inputs):
        out = forward(**inputs)
        out.logits = out.logits + torch.rand(())
        return out

    model.forward = drawing
    before = torch.get_rng_state()
    assert not looks_ahead(model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_model_that_answers_with_nan_is_refused(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match=r"model.name mine answers a plain row with NaN"):
        check_causal(model, "mine")


def test_a_model_that_needs_more_than_text_is_refused_with_its_reason(tiny_llama):
    model = tiny_llama()

    def refuse(**inputs):
        raise RuntimeError("no\nlanguage")

    model.forward = refuse
    with pytest.raises(ValueError, match=r"plain row of 8 tokens: RuntimeError: no language$"):
        check_causal(model, "mine")


def test_padding_is_kept_out_by_those_that_read_the_mask(tiny_llama):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
    assert keeps_padding_out(tiny_llama())
    assert keeps_padding_out(tiny_llama(dtype=torch.bfloat16))
    assert keeps_padding_out(t.BloomForCausalLM(t.BloomConfig(**sizes, n_head=2)).eval())
    assert not keeps_padding_out(t.RwkvForCausalLM(t.RwkvConfig(**sizes)).eval())


def test_plain_tokens_are_those_the_configuration_has_no_use_for(tiny_llama):
    model = tiny_llama()
    model.config.image_token_index = 10
    model.config.eos_token_id = [2, 20]
    taken = {0, 1, 2, 10, 20}
    assert not taken & set(plain_ids(model, 59).tolist())
    assert len(set(plain_ids(model, 16).tolist())) == 16
    assert len(plain_ids(model, 200)) == 200


def test_asking_leaves_every_mode_alone(tiny_llama):
    model = tiny_llama().train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    with asked(model):
        assert not any(module.training for module in model.modules())
    assert modes == [module.training for module in model.modules()]
