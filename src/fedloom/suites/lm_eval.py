"""A model as lm-evaluation-harness takes one, so that any of its tasks runs on what a run delivers.

Likelihoods are this package's own (`suites/likelihood.py`), answers its own generation: no second model is loaded.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedloom.evaluation.generation import Generation
from fedloom.suites.likelihood import Continuation, likelihoods, rolling

_BATCH = 16
_NEW_TOKENS = 256


def language_model(model: nn.Module, tokenizer: Any, max_length: int) -> Any:
    """Return an `lm_eval.api.model.LM` around a model, which is judged as it stands.

    Args:
        model: Answers.
        tokenizer: Its own.
        max_length: Tokens that the model reads at most.
    """
    from lm_eval.api.model import LM

    class LanguageModel(LM):  # type: ignore[misc]  # lm_eval has no types
        """Log-likelihoods and greedy answers, as requests of the harness ask for them."""

        def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
            asked = [Continuation(*request.args) for request in requests]
            found = likelihoods(model, tokenizer, asked, max_length=max_length, batch_size=_BATCH)
            return [(each.logprob, each.greedy) for each in found]

        def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
            return [
                rolling(model, tokenizer, request.args[0], max_length=max_length)
                for request in requests
            ]

        def generate_until(self, requests: Sequence[Any]) -> list[str]:
            alike: dict[tuple[int, tuple[str, ...]], list[int]] = {}
            for at, request in enumerate(requests):
                alike.setdefault(self._how(request.args[1]), []).append(at)
            found: dict[int, str] = {}
            for (most, stops), places in alike.items():
                writing = Generation(tokenizer, most, _BATCH, stops=stops, strip=False)
                texts = [requests[at].args[0] for at in places]
                encoded = [tokenizer(text, add_special_tokens=True)["input_ids"] for text in texts]
                prompts = [torch.tensor(ids[most - max_length :]) for ids in encoded]
                found.update(zip(places, writing.answers(model, prompts), strict=True))
            return [found[at] for at in range(len(requests))]

        def _how(self, settings: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
            if settings.get("do_sample") or settings.get("temperature", 0) > 0:
                raise ValueError(
                    "answers are written greedily: take a task whose generation_kwargs do not sample"
                )
            until = settings.get("until") or []
            stops = (until,) if isinstance(until, str) else tuple(until)
            return min(int(settings.get("max_gen_toks", _NEW_TOKENS)), max_length // 2), stops

        @property
        def tokenizer_name(self) -> str:
            """Return what the harness keeps answers under."""
            return str(tokenizer.name_or_path)

    return LanguageModel()


def harness(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[Any],
    *,
    max_length: int,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return what lm-evaluation-harness measures, by task; the global random generators stay as they were.

    Args:
        model: Is asked.
        tokenizer: Its own.
        tasks: Names of the harness, or configurations of tasks as mappings, such as over local files.
        max_length: Tokens that the model reads at most.
        shots: Worked examples; as the tasks have it if None.
        limit: Of the items of each task, the first so many.
    """
    try:
        import lm_eval
    except ModuleNotFoundError as error:
        raise ValueError(
            f"lm-evaluation-harness needs the package {error.name}: pip install 'fedloom[eval]'"
        ) from error

    with generators_kept():
        found = lm_eval.simple_evaluate(
            model=language_model(model, tokenizer, max_length),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            bootstrap_iters=0,
        )
    return dict(found["results"])


@contextmanager
def generators_kept() -> Iterator[None]:
    """Put the global random generators back as they were: the harness seeds them."""
    of_python, of_torch = random.getstate(), torch.get_rng_state()
    of_numpy = np.random.get_state()  # noqa: NPY002 the global one is what the harness seeds
    try:
        yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        torch.set_rng_state(of_torch)
