"""One of the processes that train a client together: `python -m fedloom.deploy.rank SETTINGS SOCKET`."""

import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fedloom.client.fast.kernels import make_fast
from fedloom.client.ranks import RankTrainer
from fedloom.client.references import References
from fedloom.client.setup import Setup
from fedloom.core.protocols import ClientError, Fit, Job
from fedloom.deploy.rank_messages import RankSettings, read_values, write_values
from fedloom.deploy.site import open_session
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.flower.pipe import serve
from fedloom.plugins import limited_to
from fedloom.recipe import load_recipe
from fedloom.spaces.live import Live
from fedloom.spaces.sharded import Sharded


def main() -> None:
    """Train with the others until the process that started this one ends."""
    settings = RankSettings.read(Path(sys.argv[1]))
    torch.set_num_threads(settings.threads)
    site = SiteSettings.read(Path(settings.site))
    with limited_to(site.imports):
        try:
            trainer = _joined(settings, site)
        except (ValueError, OSError) as error:
            sys.exit(str(error))
        serve(Path(sys.argv[2]), lambda header, _: (_answer(header, trainer), []))


def _answer(header: dict[str, Any], trainer: RankTrainer) -> dict[str, Any]:
    """Return a word on the jobs in a file; the first process writes their answers to another."""
    if header["kind"] == "hello":
        return {}
    jobs: list[Job] = read_values(Path(header["jobs"]))
    leads = dist.get_rank() == 0
    if not leads and not isinstance(trainer.setup.space, Sharded):
        # What is measured needs no help where the model is whole.
        jobs = [job for job in jobs if isinstance(job.work, Fit)]
    try:
        done = trainer.run(jobs)
    except ClientError as error:
        return {"absent": str(error)}
    except ValueError as error:
        return {"refused": str(error)}
    if leads:
        write_values(list(done), Path(header["done"]))
    return {}


def _joined(settings: RankSettings, site: SiteSettings) -> RankTrainer:
    """Return what trains here, once all processes are there."""
    recipe = load_recipe(settings.recipe)
    worker, on_cuda = recipe.worker, recipe.model.device != "cpu" and torch.cuda.is_available()
    device = "cpu"
    if on_cuda:
        torch.cuda.set_device(settings.rank)
        # What is split goes to its device layer by layer.
        device = f"cuda:{settings.rank}" if worker.replicas > 1 else "cpu"
    session = open_session(site, recipe, device=device)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo",
        init_method=Path(settings.meeting).as_uri(),
        rank=settings.rank,
        world_size=worker.num_processes,
        timeout=timedelta(seconds=worker.deadline),
    )
    local, objective, whole = recipe.local, recipe.objective, session.space
    assert isinstance(whole, Live)
    space: Live | Sharded = whole
    references = None
    if worker.shards > 1:
        mesh = init_device_mesh("cuda" if on_cuda else "cpu", (worker.shards,))
        space = Sharded(whole, mesh)
        # Kernels that pack or replace weights know nothing of those that come and go.
        local = replace(local, kernels="reference")
    fast = make_fast(space.model, local, objective)
    if isinstance(space, Live):
        references = References.of(space, objective, fast.forward)
    setup = Setup(space, session.federation, local, recipe.run.rounds, references)
    return RankTrainer(setup, fast, session.evaluator)


if __name__ == "__main__":
    main()
