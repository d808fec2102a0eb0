"""Rounds whose uploads are added up under masks, on a trainer that is a few lines: the same models as without."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, norm

from fedloom.algorithms.clustered import Clustered
from fedloom.algorithms.decomfl import DeComFL
from fedloom.algorithms.ditto import Ditto
from fedloom.algorithms.fedavg import FedAvg
from fedloom.algorithms.fedkseed import FedKSeed
from fedloom.algorithms.flasc import Flasc
from fedloom.algorithms.freeze import Freeze
from fedloom.algorithms.personal import Personal
from fedloom.algorithms.private import Private
from fedloom.algorithms.prune import Prune
from fedloom.algorithms.scaffold import Scaffold
from fedloom.client.client_state import ClientStateStore
from fedloom.clustering.given import Given
from fedloom.clustering.sharing import Sharing
from fedloom.core.protocols import Done, Fit, Job, Round, Task
from fedloom.core.randomness import generator
from fedloom.core.seed_sequences import COEFFICIENTS
from fedloom.core.sparsity import Density
from fedloom.engines.codec import MessageCodec
from fedloom.engines.inprocess import InProcess
from fedloom.engines.loopback import Loopback
from fedloom.engines.sums import RUN, Played, forecast, sums_of
from fedloom.rounds.loop import Run, advance, begin
from fedloom.secure.messages import read
from fedloom.secure.settings import SecureSettings
from fedloom.server.samplers import Full, Poisson, Sampler
from fedloom.wire.wire_settings import WireSettings

EVERYBODY = Full()
LANGUAGES = ("cs", "cs", "cs", "pt", "pt", "pt")
NUMBERS = {f"site{at}": 10 + 7 * at for at in range(6)}
LAYERS = {"layer.lora_A": torch.zeros(20, 3), "layer.lora_B": torch.zeros(17)}
SEEDS = {COEFFICIENTS: torch.zeros(64, dtype=torch.float64)}


@dataclass
class Drift:
    """Moves by noise that follows from the job."""

    width: int = 4

    def run(self, jobs: Sequence[Job]) -> list[Done]:
        return [self._done(job) for job in jobs]

    def _done(self, job: Job) -> Done:
        assert isinstance(job.work, Fit)
        source, number = generator(job.seed, "drift"), NUMBERS[job.client]
        moved = {
            n: t + 0.05 * torch.randn(t.shape, generator=source, dtype=t.dtype)
            for n, t in job.work.start.items()
        }
        told = {"loss": 2 + number / 7, "num_tokens": 9.0 * number, "num_examples": float(number)}
        record = {}
        if job.work.seed_sequence:
            met = {
                n: torch.randn(len(s), generator=source) for n, s in job.work.seed_sequence.items()
            }
            record = {"scalars": met}
        return Done(moved, number, 3, 0.3, record, told)


def played(
    algorithm: Any,
    folder: Path,
    sums: Played | None,
    *,
    make: type[InProcess] = InProcess,
    rounds: int = 2,
    run: Run[Any] | None = None,
    cohort: Sampler = EVERYBODY,
) -> tuple[Run[Any], list[Mapping[str, float]], list[str]]:
    profiles = {
        name: {"num_examples": str(number), "language": language}
        for (name, number), language in zip(NUMBERS.items(), LANGUAGES, strict=True)
    }
    engine = make(algorithm, Drift(), ClientStateStore(folder), profiles, sums=sums)
    start = SEEDS if isinstance(algorithm, FedKSeed | DeComFL) else LAYERS
    run, lines, lost = run or begin(algorithm, start, 0), [], []
    for _ in range(rounds):
        run, line, failures = advance(run, algorithm, engine, population=profiles, sampler=cohort)
        lines.append(line)
        lost += [failure.reason for failure in failures]
    return run, lines, lost


def apart(one: Any, other: Any) -> float:
    """Return the largest difference of two states' tensors."""
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape
        return float((one.double() - other.double()).abs().max()) if one.numel() else 0.0
    if isinstance(one, Mapping):
        assert one.keys() == other.keys()
        return max((apart(one[key], other[key]) for key in one), default=0.0)
    if hasattr(one, "__dataclass_fields__"):
        return max(apart(getattr(one, f), getattr(other, f)) for f in one.__dataclass_fields__)
    return 0.0


def flat(params: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in params.values()])


ALGORITHMS = {
    "fedavg": FedAvg(),
    "fedkseed": FedKSeed(uploads="delta", steps=4),
    "flasc": Flasc(FedAvg(), upload_on="download"),
    "scaffold": Scaffold(),
    "ditto": Ditto(FedAvg(), strength=0.5),
    "prune": Prune(FedAvg()),
    "federated select": Prune(FedAvg(), Density(0.5), regrow=True),
    "freeze": Freeze(Flasc(FedAvg(), upload_on="download")),
    "personal": Personal(FedAvg(), local="lora_B"),
}


@pytest.mark.parametrize("make", [InProcess, Loopback])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_model_is_that_of_uploads_in_the_open_within_the_fixed_point_step(
    name: str, make: type[InProcess], tmp_path: Path
):
    algorithm, settings = ALGORITHMS[name], SecureSettings(4, bits=24)
    plain, lines, _ = played(algorithm, tmp_path / "plain", None, make=make)
    hidden, told, lost = played(algorithm, tmp_path / "sums", Played(settings), make=make)
    # Each of six rounds by up to a step, of weights that are up to 2.2 times the mean; twice, and what follows of it.
    assert apart(plain.state, hidden.state) <= 2 * 6 * 2.0**-24
    assert not lost
    for before, line in zip(lines, told, strict=True):
        alike = [n for n in before if n.startswith(("train/", "comm/num_", "comm/round"))]
        assert {n: line[n] for n in alike} == pytest.approx({n: before[n] for n in alike})
        assert line["comm/entries_cut"] == 0


def test_who_is_gone_before_its_upload_is_absent_and_who_is_gone_after_it_counts(tmp_path: Path):
    gone = Played(SecureSettings(4), frozenset({"site1"}), frozenset({"site4"}))
    hidden, (line,), lost = played(FedAvg(), tmp_path, gone, rounds=1)
    assert lost == ["lost on the way"]
    assert (line["comm/num_replies"], line["comm/num_absent"]) == (5, 1)
    engine = Loopback(
        FedAvg(),
        Drift(),
        ClientStateStore(tmp_path / "plain"),
        {name: {"num_examples": str(number)} for name, number in NUMBERS.items()},
        lost=frozenset({"site1"}),
    )
    plain, _, _ = advance(
        begin(FedAvg(), LAYERS, 0), FedAvg(), engine, population=engine.population(), sampler=Full()
    )
    assert apart(plain.state, hidden.state) < 2e-5


def test_below_the_threshold_a_round_changes_nothing_and_says_why(tmp_path: Path):
    gone = Played(SecureSettings(6), frozenset({"site1"}))
    run, (line,), lost = played(FedAvg(), tmp_path, gone, rounds=1)
    assert apart(run.state.params, LAYERS) == 0
    assert (line["comm/num_replies"], line["comm/num_absent"], line["comm/round_kept"]) == (0, 6, 0)
    assert "a secure sum needs 6 clients (secure.threshold, and more than half), 5 are left" in lost


def test_a_resumed_round_is_set_up_anew_and_has_the_same_sum_to_the_bit(tmp_path: Path):
    heard: list[bytes] = []
    sums = Played(SecureSettings(4), heard=lambda step, name, data: heard.append(data))
    once, _, _ = played(FedAvg(), tmp_path / "one", sums, rounds=1)
    through, _, _ = played(FedAvg(), tmp_path / "one", sums, rounds=1, run=once)
    first = {*heard}
    heard.clear()
    again, _, _ = played(FedAvg(), tmp_path / "one", sums, rounds=1, run=once)
    assert apart(through.state, again.state) == 0
    assert first.isdisjoint(heard)


def test_no_upload_can_be_told_from_all_bytes_a_server_received(tmp_path: Path):
    heard: dict[str, list[bytes]] = {}

    def listen(step: str, name: str, data: bytes) -> None:
        if step == "upload":
            heard.setdefault(name, []).append(read(data)[1][0])

    played(FedAvg(), tmp_path, Played(SecureSettings(4), heard=listen), rounds=4)
    for uploads in heard.values():
        assert len({*uploads}) == 4
        together = torch.frombuffer(bytearray(b"".join(uploads)), dtype=torch.uint8)
        assert chisquare(torch.bincount(together.long(), minlength=256).numpy()).pvalue > 1e-6


def test_private_adds_its_noise_to_a_sum_that_it_cannot_open(tmp_path: Path):
    """Without noise the two are one; with it the account counts the release as ever, and its seal differs."""
    everybody = Poisson(1.0)
    private = Private(FedAvg(weighting="uniform"), clip=0.3, noise_multiplier=0.0, noise_seed=1)
    plain, *_ = played(private, tmp_path / "plain", None, cohort=everybody)
    sums = Played(SecureSettings(4, bits=24))
    hidden, (line, _), _ = played(private, tmp_path / "sums", sums, cohort=everybody)
    # Clients' entries are rounded towards zero: up to a step each, and never beyond the clip.
    assert 0 < apart(plain.state.inner, hidden.state.inner) <= 2 * 2.0**-24
    assert line["comm/num_replies"] == 6
    # In coarse steps it shows that what was clipped is no longer than its clip.
    coarse = Played(SecureSettings(4, bits=8, clip=8.0))
    cut, *_ = played(private, tmp_path / "coarse", coarse, cohort=everybody, rounds=1)
    open_, *_ = played(private, tmp_path / "open", None, cohort=everybody, rounds=1)
    lengths = [float(flat(run.state.inner.params).norm()) for run in (cut, open_)]
    assert 0 < lengths[0] < 0.8 * lengths[1]
    # Too few for a sum: with noise the model moves by noise alone, and nothing tells how many there were.
    noisy = replace(private, noise_multiplier=1.0)
    few = Played(SecureSettings(6), before=frozenset({"site0"}))
    alone, (line,), _ = played(noisy, tmp_path / "few", few, cohort=everybody, rounds=1)
    assert line["comm/num_replies"] == 0
    assert apart(alone.state.inner.params, LAYERS) > 0
    assert len(tuple(noisy.released(alone.state))) == 1


SHARED = Private(
    FedAvg(weighting="uniform"),
    clip=0.01,
    noise_multiplier=5.0,
    noise="distributed",
    delta=0.1,
    rounds=20,
    threshold=4,
)
"""Its noise is so much more than what clients send that a mean's entries are noise."""


@pytest.mark.parametrize(
    ("gone", "number"),
    [({}, 6), ({"after": frozenset({"site0"})}, 6), ({"before": frozenset({"site0", "site3"})}, 4)],
    ids=["everybody", "gone after its upload", "as many gone as may be"],
)
def test_shares_of_noise_add_up_to_what_is_accounted_for_whoever_drops_out(
    gone: dict[str, Any], number: int, tmp_path: Path
) -> None:
    """20 rounds of 77 entries: their mean square is known to 4 %; of four, the fewest, it is (z C / 6)^2."""
    sums, noise, run = Played(SecureSettings(4, bits=20, clip=0.2), **gone), [], None
    for _ in range(20):
        before = LAYERS if run is None else run.state.inner.params
        run, (line,), _ = played(SHARED, tmp_path, sums, cohort=Poisson(1.0), rounds=1, run=run)
        assert (line["comm/num_replies"], line["comm/entries_cut"]) == (number, 0)
        noise.append(flat(run.state.inner.params).double() - flat(before).double())
    assert run is not None
    square = float(torch.cat(noise).square().mean()) / (5.0 * 0.01 / 6) ** 2
    assert square == pytest.approx(number / 4, rel=0.2)
    # As often as a client takes part, and not by the chance of being drawn: the curve of Balle and Wang 2018, theorem 8.
    assert [(number, q, z) for number, _, q, z in SHARED.released(run.state)] == [
        (at, 1.0, 5.0) for at in range(1, 21)
    ]
    mu, found = 20**0.5 / 5.0, line["server/epsilon"]
    delta = norm.cdf(mu / 2 - found / mu) - exp(found) * norm.cdf(-mu / 2 - found / mu)
    assert delta == pytest.approx(0.1, rel=0.01)


def test_without_a_sum_shares_make_no_step_and_nothing_is_spent(tmp_path: Path) -> None:
    few = Played(SecureSettings(6, clip=0.2), before=frozenset({"site0"}))
    alone, (line,), _ = played(SHARED, tmp_path, few, cohort=Poisson(1.0), rounds=1)
    assert line["comm/round_kept"] == 0
    assert not SHARED.released(alone.state)
    assert apart(alone.state.inner.params, LAYERS) == 0


def test_given_clusters_have_a_sum_each_and_one_that_is_too_small_none(tmp_path: Path):
    given = Clustered(FedAvg(), mode=Given("language"), share=Sharing(pool="off"))
    assert given.server_sees == "mean of each cluster"
    sums = Played(SecureSettings(3, bits=24))
    plain, before, _ = played(given, tmp_path / "plain", None, rounds=3)
    hidden, lines, lost = played(given, tmp_path / "sums", sums, rounds=3)
    assert apart(plain.state, hidden.state) <= 3 * 6 * 2.0**-24
    assert not lost
    assert apart(*(hidden.state.cluster_states[k].params for k in (0, 1))) > 0.01
    assert lines[-1]["server/num_clusters"] == before[-1]["server/num_clusters"] == 2
    gone = Played(SecureSettings(3), before=frozenset({"site0"}))
    _, (line,), lost = played(given, tmp_path / "gone", gone, rounds=1)
    assert (line["comm/num_replies"], line["comm/num_absent"]) == (3, 3)
    assert "lost on the way" in lost


def test_votes_are_added_up_to_the_same_majority(tmp_path: Path):
    sums, votes = Played(SecureSettings(4)), DeComFL(votes=True, steps=5)
    plain, before, _ = played(votes, tmp_path / "plain", None)
    hidden, lines, _ = played(replace(votes, added_up=True), tmp_path / "sums", sums)
    assert apart(plain.state, hidden.state) == 0
    assert apart(plain.state.params, SEEDS) > 0
    agreed = [[line["server/agreement"] for line in told] for told in (before, lines)]
    assert agreed[0] == pytest.approx(agreed[1])


def test_an_entry_that_is_too_large_is_cut_and_counted(tmp_path: Path):
    _, (line,), _ = played(FedAvg(), tmp_path, Played(SecureSettings(4, clip=0.01)), rounds=1)
    assert 0 < line["comm/entries_cut"] <= 6 * 77


def test_a_client_that_cannot_be_added_up_is_absent_alone(tmp_path: Path):
    @dataclass
    class Diverged(Drift):
        def _done(self, job: Job) -> Done:
            done = super()._done(job)
            lost = job.client == "site2"
            return replace(done, metrics={"loss": float("nan")}) if lost else done

    engine = InProcess(
        FedAvg(),
        Diverged(),
        ClientStateStore(tmp_path),
        {name: {"num_examples": str(number)} for name, number in NUMBERS.items()},
        sums=Played(SecureSettings(4)),
    )
    _, line, (failure,) = advance(
        begin(FedAvg(), LAYERS, 0), FedAvg(), engine, population=engine.population(), sampler=Full()
    )
    assert (failure.client, line["comm/num_replies"]) == ("site2", 5)
    assert "loss" in failure.reason


def test_clients_that_declare_nothing_have_no_heaviest(tmp_path: Path):
    engine = InProcess(
        FedAvg(),
        Drift(),
        ClientStateStore(tmp_path),
        {name: {} for name in NUMBERS},
        sums=Played(SecureSettings(4)),
    )
    with pytest.raises(ValueError, match="clients whose profiles declare num_examples"):
        advance(
            begin(FedAvg(), LAYERS, 0),
            FedAvg(),
            engine,
            population=engine.population(),
            sampler=Full(),
        )


def test_the_forecast_of_a_sum_is_what_it_sends(tmp_path: Path):
    algorithm, settings = FedAvg(), SecureSettings(4, 4)
    _, (line,), _ = played(algorithm, tmp_path, Played(settings), rounds=1)
    profiles = {name: {"num_examples": str(number)} for name, number in NUMBERS.items()}
    state = algorithm.init(LAYERS, 0)
    sent = algorithm.broadcast(state, Round(1, 0, profiles, tuple(profiles), 1.0))
    tasks = [Task("train", 1, name, 0, profile, sent[name]) for name, profile in profiles.items()]
    codec = MessageCodec(algorithm, WireSettings())
    _, up = forecast(sums_of(tasks, codec.bodies(tasks), codec, settings, RUN))
    # Names and signatures differ by a few bytes.
    assert up == pytest.approx(line["comm/upload_bytes"], abs=6 * 40)
