import pytest

from fedloom.client.local_settings import LocalSettings


@pytest.mark.parametrize(("done", "lr"), [(0, 5.0e-4), (50, 2.55e-4), (99, 1.0121e-5)])
def test_the_cosine_schedule_gives_the_published_rates(done: int, lr: float):
    """From 5e-4 down to 1e-5 in 100 rounds."""
    local = LocalSettings(lr=5e-4, min_lr=1e-5, schedule="cosine")
    assert local.lr_at(done + 1, 100) == pytest.approx(lr, rel=1e-4)


def test_the_linear_schedule_falls_evenly_to_its_minimum():
    local = LocalSettings(lr=1.0, min_lr=0.2, schedule="linear")
    assert [local.lr_at(r, 4) for r in (1, 2, 3, 4, 5)] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert local.lr_at(9, 4) == pytest.approx(0.2)


def test_the_constant_schedule_stays():
    assert {LocalSettings(lr=0.3).lr_at(r, 7) for r in range(1, 8)} == {0.3}


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear"])
def test_the_warm_up_grows_to_the_rate_and_never_starts_at_zero(schedule: str):
    local = LocalSettings(lr=1.0, schedule=schedule, warmup_rounds=3)  # type: ignore[arg-type]
    assert [local.lr_at(r, 10) for r in (1, 2, 3, 4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])


def test_epochs_count_whole_passes_and_steps_override_them():
    local = LocalSettings(batch_size=2, accumulation=2, epochs=3)
    assert local.num_steps(9, None) == 9
    assert local.num_steps(9, 2) == 2
    assert LocalSettings(steps=5).num_steps(1000, None) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "adam"}, r"local.optimizer must be one of sgd, adamw, got adam"),
        ({"schedule": "step"}, r"local.schedule must be one of constant, cosine, linear, got step"),
        (
            {"precision": "float16"},
            r"local.precision must be one of float32, bfloat16, got float16",
        ),
        ({"batched": "on"}, r"local.batched must be one of auto, off, got on"),
        ({"kernels": "mkl"}, r"local.kernels must be one of .*, got mkl"),
        ({"lr": 0.0}, r"local.lr must be positive, got 0.0"),
        ({"lr": float("nan")}, r"local.lr must be positive, got nan"),
        ({"steps": 0}, r"local.steps must be at least 1, got 0"),
        ({"epochs": 0}, r"local.epochs must be at least 1, got 0"),
        ({"batch_size": 0}, r"local.batch_size must be at least 1, got 0"),
        ({"accumulation": 0}, r"local.accumulation must be at least 1, got 0"),
        ({"group_tokens": 0}, r"local.group_tokens must be at least 1, got 0"),
        ({"warmup_rounds": -1}, r"local.warmup_rounds must be at least 0, got -1"),
        ({"weight_decay": -0.1}, r"local.weight_decay must be at least 0, got -0.1"),
        ({"max_grad_norm": 0.0}, r"local.max_grad_norm must be positive or null, got 0.0"),
        ({"optimizer": "sgd", "momentum": 1.0}, r"local.momentum must be in \[0, 1\), got 1.0"),
        ({"betas": (0.9, 1.0)}, r"local.betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        (
            {"min_lr": 1.0, "schedule": "cosine"},
            r"local.min_lr must be at most local.lr .*, got 1.0",
        ),
        ({"min_lr": 1e-5}, r"local.min_lr needs local.schedule cosine or linear, got constant"),
        ({"momentum": 0.9}, r"local.momentum belongs to local.optimizer sgd, got adamw"),
        ({"steps": 3, "epochs": 2}, r"local.epochs has no effect beside local.steps"),
        (
            {"kernels": "onednn", "precision": "bfloat16"},
            r"local.kernels onednn needs .* got bfloat16",
        ),
        ({"order": "second"}, r"local.order must be one of first, zeroth, got second"),
        ({"difference": "both"}, r"local.difference must be one of central, forward, got both"),
        ({"directions": 0}, r"local.directions must be at least 1, got 0"),
        ({"eps": 0.0}, r"local.eps must be positive or null, got 0.0"),
        ({"max_slope": -1.0}, r"local.max_slope must be positive or null, got -1.0"),
        ({"order": "first", "eps": 1e-3}, r"local.eps belongs to local.order zeroth, got first"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_refused(given, message: str):
    with pytest.raises(ValueError, match=message):
        LocalSettings(**given)
