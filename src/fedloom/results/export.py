"""What a run delivers, as folders and files that other programs load."""

import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from fedloom.core.description import GLOBAL, Clusters, describe
from fedloom.core.files import file_name
from fedloom.core.params import equal
from fedloom.core.protocols import ClientId, Params
from fedloom.models.gguf_names import GgufNames
from fedloom.models.gguf_write import GgufType, write_lora_gguf, write_model_gguf
from fedloom.models.lora_folder import LoraFactors, read_lora, vllm_rank
from fedloom.report.card import Exported, Form, model_card
from fedloom.results.routing import write_routing
from fedloom.results.seed_file import SUFFIX, SeedFile
from fedloom.rounds.loop import Run
from fedloom.rounds.session import Session
from fedloom.spaces.adapter import AdapterSpace
from fedloom.spaces.scaling_vectors import VeRA


def deliverables(session: Session, run: Run[Any]) -> dict[str, tuple[Params, list[ClientId]]]:
    """Return every distinct model by name, and who uses it.

    `global` where all use one, and for the one of clients that never train; otherwise the cluster's name for the one of a
    cluster, the client's id for a personal one, and `tier-NAME` for the one of a tier. Whose id is the name of another
    model has `-own` behind it.
    """
    found = describe(session.recipe.algorithm, run.state).clusters or Clusters()
    groups: dict[int, tuple[Params, list[ClientId]]] = {}
    # Where nobody has anything to measure on, whoever learns uses what was learnt.
    users = set(found.assignment) | (set() if session.judges else set(session.learners))
    for client, params in session.deployed(run, also=users).items():
        groups.setdefault(id(params), (params, []))[1].append(client)
    if len(groups) == 1:
        return {GLOBAL: next(iter(groups.values()))}
    clusters = [
        {found.assignment.get(client, GLOBAL) for client in clients}
        for _, clients in groups.values()
    ]
    people = session.engine.population()
    tiers = [{people[client].get("tier") for client in clients} for _, clients in groups.values()]
    unseen = set(session.unseen)
    strangers = [clients for _, clients in groups.values() if unseen.issuperset(clients)]
    taken, ids = (
        {each.casefold() for each in (GLOBAL, *found.names)},
        {c.casefold() for c in people},
    )
    named: dict[str, tuple[Params, list[ClientId]]] = {}
    for (params, clients), theirs, tier in zip(groups.values(), clusters, tiers, strict=True):
        if found.assignment and len(theirs) == 1 and clusters.count(theirs) == 1:
            (name,) = theirs
        elif strangers == [clients]:
            name = GLOBAL
        elif len(clients) == 1:
            (name,) = clients
            if name.casefold() in taken:
                name = _apart(name, taken | ids)
        elif len(tier) == 1 and None not in tier and tiers.count(tier) == 1:
            name = _apart(file_name(f"tier-{next(iter(tier))}"), taken | ids)
        else:
            name = _apart(f"group-{len(named)}", taken | ids)
        named[name] = (params, clients)
        taken.add(name.casefold())
    return named


def _apart(name: str, taken: Collection[str]) -> str:
    """Return a name that is not taken, on a disk that knows no capitals either."""
    while name.casefold() in taken:
        name += "-own"
    return name


def routable(session: Session, run: Run[Any]) -> dict[str, tuple[Params, list[ClientId]]]:
    """Return what somebody new may be sent to: every distinct model, and `global`, the one for all, where one was learnt."""
    models = deliverables(session, run)
    if len(models) > 1 and GLOBAL not in models:
        shared = session.newcomer(run)
        if not equal(shared, session.space.start()):
            models[GLOBAL] = (shared, [])
    return models


def check_form(form: str, type: str | None) -> tuple[Form, GgufType | None]:
    """Return both as they are.

    Raises:
        ValueError: where one is none, or the type has no effect.
    """
    if form not in get_args(Form):
        raise ValueError(f"--for must be one of {', '.join(get_args(Form))}, got {form}")
    if type is not None and form != "gguf":
        raise ValueError(
            f"--type is that of whole models as GGUF, --for gguf, got {type} with --for {form}"
        )
    if type is not None and type not in get_args(GgufType):
        raise ValueError(f"--type must be one of {', '.join(get_args(GgufType))}, got {type}")
    return cast(Form, form), cast(GgufType | None, type)


def export_models(
    session: Session,
    run: Run[Any],
    folder: Path,
    *,
    form: Form = "peft",
    type: GgufType = "f16",
    newcomers: bool = False,
) -> Mapping[str, Path]:
    """Write one folder a deliverable, and which is whose.

    Args:
        session: The run's.
        run: As it stands.
        folder: Where; a folder in it for each.
        form: What is written of each, see `report.card.Form`.
        type: Of the matrices of a whole model as GGUF.
        newcomers: Whether the model for all is written too, where clusters or clients have their own.

    Returns:
        What to load, by name: the folder, or the file in it.

    Raises:
        ValueError: where what was tuned cannot be had in this form, or a folder holds a model of another one.
    """
    models = (routable if newcomers else deliverables)(session, run)
    writer = _Writer(session, form, type)
    for name in models:
        writer.check(folder / name)
    written: dict[str, Path] = {}
    for name, (params, clients) in models.items():
        exported = writer.write(folder / name, name, params)
        card = model_card(
            session.folder, adapter=name, clients=clients, exported=exported, gguf=session.base.gguf
        )
        (folder / name / "README.md").write_text(card)
        written[name] = folder / name / exported.file
    users = {name: clients for name, (_, clients) in models.items()}
    write_routing(folder, written, users, quiet=describe(session.recipe.algorithm).quiet)
    return written


@dataclass(frozen=True)
class _Writer:
    """Writes models in one form."""

    session: Session
    form: Form
    type: GgufType

    def check(self, folder: Path) -> None:
        """Refuse a folder that would hold an adapter and a whole model, of which programs load both, or the other one.

        Raises:
            ValueError: where one of another form is there already.
        """
        adapter = self.session.recipe.tune.is_adapter
        others = {
            "peft": "config.json" if adapter else "adapter_config.json",
            **dict.fromkeys(("lora", "vllm"), "config.json"),
            **dict.fromkeys(("merged", "nf4"), "adapter_config.json"),
        }
        if self.form in others and (folder / others[self.form]).exists():
            raise ValueError(
                f"{folder} holds a model of another form, which would be loaded with this one: take another folder with --out"
            )

    def write(self, folder: Path, name: str, params: Params) -> Exported:
        """Write one model into a folder of its own, and return what lies there."""
        return self._ways[self.form](folder, name, params)

    @property
    def _ways(self) -> Mapping[Form, Callable[[Path, str, Params], Exported]]:
        return {
            "peft": self._peft,
            "lora": self._lora,
            "vllm": self._vllm,
            "gguf-lora": self._gguf_lora,
            "merged": self._merged,
            "nf4": self._nf4,
            "gguf": self._gguf,
            "seeds": self._seeds,
        }

    def _peft(self, folder: Path, name: str, params: Params) -> Exported:
        self.session.space.save(folder, params)
        if self.session.recipe.tune.is_seed_space:
            self._seeds(folder, name, params)
        return Exported("peft" if self.session.recipe.tune.is_adapter else "merged")

    def _lora(self, folder: Path, name: str, params: Params) -> Exported:
        space = self.session.space
        if not isinstance(space, AdapterSpace):
            raise ValueError(
                f"only an adapter of tune: vera can be written as LoRA, got {self.session.recipe.tune.title}"
            )
        space.save_as_lora(folder, params)
        return Exported("peft")

    def _vllm(self, folder: Path, name: str, params: Params) -> Exported:
        lora = self._factors(params, "vLLM")
        rank = vllm_rank(lora.rank)
        lora.write(folder)
        return Exported("vllm", rank=rank)

    def _gguf_lora(self, folder: Path, name: str, params: Params) -> Exported:
        lora = self._factors(params, "llama.cpp")
        file = f"{file_name(name)}-lora.gguf"
        # A model around an emulator has fewer layers than the one that the adapter is for.
        with self.session.evaluator.deployed():
            write_lora_gguf(lora, self.session.base.model.config, folder / file)
        return Exported("gguf-lora", file)

    def _merged(self, folder: Path, name: str, params: Params) -> Exported:
        self.session.space.save_merged(folder, params)
        return Exported("merged")

    def _nf4(self, folder: Path, name: str, params: Params) -> Exported:
        space = self.session.space
        if not isinstance(space, AdapterSpace):
            raise ValueError(
                f"--for nf4 is of adapters to a base in NF4, got tune: {self.session.recipe.tune.title}: export it with"
                " --for merged"
            )
        drift = f"{space.save_requantized(folder, params)}"
        return Exported("nf4", note=f"Merged, and in NF4 again: {drift}.")

    def _gguf(self, folder: Path, name: str, params: Params) -> Exported:
        file = f"{file_name(name)}-{self.type}.gguf"
        base = self.session.base
        GgufNames.of(base.model.config)  # before a model is written that none can be made of
        with _beside(folder) as whole:
            self.session.space.save_merged(whole, params)
            called = f"{self.session.recipe.name} {name}"
            target = folder / file
            write_model_gguf(whole, target, type=self.type, name=called, source=base.gguf_path)
        return Exported("gguf", file)

    def _seeds(self, folder: Path, name: str, params: Params) -> Exported:
        file = f"{file_name(name)}{SUFFIX}"
        SeedFile.of(self.session, params).write(folder / file)
        return Exported("seeds", file)

    def _factors(self, params: Params, server: str) -> LoraFactors:
        """Return a model's adapter as pairs of low-rank factors."""
        tune, space = self.session.recipe.tune, self.session.space
        if not tune.is_adapter:
            raise ValueError(
                f"{server} takes adapters of LoRA alone, got tune: {tune.title}: export the whole model, with --for merged"
                " or --for gguf"
            )
        with tempfile.TemporaryDirectory() as made:
            if isinstance(tune, VeRA) and isinstance(space, AdapterSpace):
                space.save_as_lora(Path(made), params)
            else:
                space.save(Path(made), params)
            return read_lora(Path(made), server=server)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Yield a folder for a while, on the disk that the result is written to."""
    there = next(at for at in folder.absolute().parents if at.exists())
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=there) as made:
        yield Path(made)
