import math
import pickle
from typing import Any

import pytest
import torch

from fedloom.core.payloads import mean_upload
from fedloom.core.protocols import Params, Reply
from fedloom.server.optimizers import SERVER_OPTIMIZERS, SGD, Adagrad, Adam, AdamW, Momentum, Yogi

# Two clients of 1 and 3 examples; their deltas in rounds 1 and 2.
DELTAS = [(0.4, 0.1), (-0.2, 0.4)]

GOLDEN = [
    ("fedavg", SGD(), "examples", (1.175, 1.425)),
    ("fedavgm of openfedllm", Momentum(variant="openfedllm"), "examples", (1.175, 1.3575)),
    ("fedavgm", Momentum(), "examples", (1.175, 1.5825)),
    ("fedadagrad", Adagrad(), "uniform", (1.00099601, 1.00136602)),
    ("fedyogi of openfedllm", Yogi(variant="openfedllm"), "uniform", (1.009608, 1.01626039)),
    ("fedadam of openfedllm", Adam(variant="openfedllm"), "uniform", (1.00960807, 1.01627773)),
    ("fedyogi", Yogi(), "uniform", (1.0009608, 1.00212382)),
    ("fedadam", Adam(), "uniform", (1.00096081, 1.0021287)),
]


def digits(value: float) -> int:
    return len(str(value).partition(".")[2])


@pytest.mark.parametrize(
    ("optimizer", "weighting", "expected"), [g[1:] for g in GOLDEN], ids=[g[0] for g in GOLDEN]
)
def test_two_rounds_give_the_golden_numbers_to_the_printed_digit(
    optimizer: Any, weighting: str, expected: tuple[float, float]
) -> None:
    params = {"g": torch.ones((), dtype=torch.float64)}
    moments, seen = optimizer.init(params), []
    for deltas in DELTAS:
        replies = [
            Reply(
                f"c{n}",
                {"delta": {"g": torch.tensor(delta, dtype=torch.float64)}},
                float(n) if weighting == "examples" else 1.0,
            )
            for n, delta in zip((1, 3), deltas, strict=True)
        ]
        params, moments = optimizer.step(params, mean_upload(replies)["delta"], moments)
        seen.append(float(params["g"]))
    for value, golden in zip(seen, expected, strict=True):
        assert round(value, digits(golden)) == golden
    assert moments.num_steps == 2


def test_the_second_moment_of_adam_follows_the_paper_line_by_line() -> None:
    beta1, beta2, tau, lr = 0.8, 0.95, 0.01, 0.1
    optimizer = Adam(lr=lr, beta1=beta1, beta2=beta2, tau=tau)
    params: Params = {"g": torch.tensor([0.5], dtype=torch.float64)}
    moments = optimizer.init(params)
    x, m, v = 0.5, 0.0, tau**2
    for delta in (0.3, -0.7, 0.2):
        m, v = beta1 * m + (1 - beta1) * delta, beta2 * v + (1 - beta2) * delta**2
        x += lr * m / (math.sqrt(v) + tau)
        given = {"g": torch.tensor([delta], dtype=torch.float64)}
        params, moments = optimizer.step(params, given, moments)
        assert float(params["g"]) == pytest.approx(x, abs=1e-15)


def test_yogi_shrinks_its_second_moment_by_no_more_than_the_squared_delta() -> None:
    params: Params = {"g": torch.zeros(1, dtype=torch.float64)}
    optimizer = Yogi(beta2=0.9)
    moments = optimizer.init(params)
    for delta, expected in ((1.0, 1e-6 + 0.1), (0.1, 1e-6 + 0.1 - 0.1 * 0.01)):
        given = {"g": torch.tensor([delta], dtype=torch.float64)}
        params, moments = optimizer.step(params, given, moments)
        assert float(moments.v["g"]) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_adamw_is_torchs_to_the_bit(dtype: torch.dtype, weight_decay: float) -> None:
    draw = torch.Generator().manual_seed(0)
    deltas = [torch.randn(50, generator=draw, dtype=dtype) for _ in range(6)]
    optimizer = AdamW(3e-3, weight_decay=weight_decay)
    params: Params = {"g": torch.linspace(-1, 1, 50, dtype=dtype)}
    value = torch.nn.Parameter(params["g"].clone())
    theirs = torch.optim.AdamW([value], lr=3e-3, weight_decay=weight_decay, foreach=False)
    moments = optimizer.init(params)
    for delta in deltas:
        params, moments = optimizer.step(params, {"g": delta}, moments)
        value.grad = -delta
        theirs.step()
        assert torch.equal(params["g"], value.detach())


@pytest.mark.parametrize("kind", SERVER_OPTIMIZERS.values())
def test_a_step_leaves_its_arguments_alone(kind: Any) -> None:
    optimizer = kind()
    params, delta = {"g": torch.ones(3)}, {"g": torch.full((3,), 0.5)}
    moments = optimizer.init(params)
    before = pickle.dumps((params, delta, moments))
    optimizer.step(params, delta, moments)
    assert pickle.dumps((params, delta, moments)) == before


@pytest.mark.parametrize("kind", SERVER_OPTIMIZERS.values())
def test_half_precision_params_are_stepped_in_float32(kind: Any) -> None:
    optimizer = kind()
    params = {"g": torch.ones(3, dtype=torch.bfloat16)}
    moved, moments = optimizer.step(params, {"g": torch.full((3,), 1e-3)}, optimizer.init(params))
    assert moved["g"].dtype is torch.float32
    assert bool((moved["g"] > 1).all())  # in bfloat16 the step would have been lost
    assert {t.dtype for part in (moments.m, moments.v) for t in part.values()} <= {torch.float32}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SGD(lr=0), r"server\.sgd\.lr must be a positive number, got 0"),
        (lambda: SGD(lr=math.nan), r"server\.sgd\.lr must be a positive number, got nan"),
        (lambda: Momentum(lr=-1), r"server\.momentum\.lr must be a positive number, got -1"),
        (lambda: Momentum(beta=1.0), r"server\.momentum\.beta must be in \[0, 1\), got 1\.0"),
        (
            lambda: Momentum(variant="ours"),  # type: ignore[arg-type] # the error under test
            r"server\.momentum\.variant must be paper or openfedllm, got 'ours'",
        ),
        (lambda: Adagrad(tau=0), r"server\.adagrad\.tau must be a positive number, got 0"),
        (lambda: Adagrad(beta1=2), r"server\.adagrad\.beta1 must be in \[0, 1\), got 2"),
        (lambda: Yogi(beta2=-0.1), r"server\.yogi\.beta2 must be in \[0, 1\), got -0\.1"),
        (lambda: Adam(beta1=1), r"server\.adam\.beta1 must be in \[0, 1\), got 1"),
        (
            lambda: AdamW(weight_decay=-1),
            r"server\.adamw\.weight_decay must be in \[0, 1\), got -1",
        ),
        (lambda: AdamW(epsilon=0), r"server\.adamw\.epsilon must be a positive number, got 0"),
        (lambda: Adam(lr=math.inf), r"server\.adam\.lr must be a positive number, got inf"),
    ],
)
def test_settings_out_of_range_name_themselves(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("kind", SERVER_OPTIMIZERS.values())
def test_optimizers_hold_no_state_and_travel(kind: Any) -> None:
    optimizer = kind()
    assert pickle.loads(pickle.dumps(optimizer)) == optimizer
    with pytest.raises((AttributeError, TypeError)):
        optimizer.cache = 1
