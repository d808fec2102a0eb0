from fedloom.models.asking import asked, plain_ids


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
