"""A run <-> bytes, and the folder that keeps the newest few.

A run is frozen dataclasses, tuples, lists, dicts, numbers, strings, bytes and tensors. No pickle: types are
looked up among those found in a freshly begun run, never imported by a name in the file.
"""

import base64
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from fedloom.core.files import PART, DamagedFile, read_hashed, write_hashed
from fedloom.core.protocols import ClientError, Payload
from fedloom.spaces.handshake import agree
from fedloom.wire.format import WireError, decode_with_header, encode

_SCALARS = (type(None), bool, int, float, str)


class Numbered(Protocol):
    """A frozen dataclass that knows its round."""

    @property
    def number(self) -> int:
        """Return the last finished round."""
        ...


@runtime_checkable
class Holds(Protocol):
    """A dataclass that comes to hold others than it begins with."""

    @property
    def holds(self) -> tuple[type, ...]:
        """Return their types."""
        ...


R = TypeVar("R", bound=Numbered)
Check = Callable[[R, Mapping[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Resumed(Generic[R]):
    """What a folder of checkpoints gave back."""

    run: R
    extra: Mapping[str, Any]
    """As given to `save`."""
    damaged: tuple[str, ...]
    """Why each newer checkpoint was passed over, newest first."""


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The newest checkpoints of one run."""

    folder: Path
    keep: int = 2
    """How many; the older ones stand in where the newest is damaged."""
    settings: Mapping[str, Any] | None = None
    """The recipe by dotted path, JSON values, less what may change when a run is resumed; None reads any run's."""
    space: Mapping[str, str] = field(default_factory=dict)
    """What a checkpoint's params mean weights by, see `spaces.handshake`."""
    sections: Sequence[str] | None = None
    """Of `settings`, those compared with a checkpoint's; None: all."""

    def __post_init__(self) -> None:
        """Refuse to keep none."""
        if self.keep < 1:
            raise ValueError(f"run.keep_checkpoints must be at least 1, got {self.keep}")

    def rounds(self) -> list[int]:
        """Return the rounds there are files of, ascending; client memory is needed from the first."""
        names = [path.name for path in self.folder.glob("*")]
        found = (re.fullmatch(r"round-([0-9]+)\.ckpt", name) for name in names)
        rounds = sorted(int(name[1]) for name in found if name)
        # A foreign name that reads like one of ours is not one.
        return [number for number in rounds if self._path(number).name in names]

    def save(self, run: Numbered, extra: Mapping[str, Any] | None = None) -> Path:
        """Write a run, then drop what is older than the `keep` newest and what is from its future.

        Raises:
            DiskFull: where it does not fit; the checkpoints before are intact.
        """
        path = self._path(run.number)
        trees = {
            "run": run,
            "extra": dict(extra or {}),
            "settings": dict(self.settings or {}),
            "space": dict(self.space),
        }
        # A state may hold a secret: the key of the noise of a private run.
        write_hashed(path, _encode(trees), private=self.folder)
        numbers = self.rounds()
        # Later rounds belong to a course that was given up; a damaged one must not displace a good one.
        past = [number for number in numbers if number <= run.number][-self.keep :]
        for number in set(numbers) - set(past):
            if not self._path(number).is_dir():
                self._path(number).unlink()
        for leftover in self.folder.glob(f"round-*{PART}"):
            leftover.unlink()
        return path

    def load(self, fresh: R, *, check: Check[R] | None = None) -> Resumed[R]:
        """Return the newest good checkpoint, and change nothing: another process may be writing here.

        Args:
            fresh: The same recipe's run before its first round.
            check: Takes the run and what was saved beside it; a DamagedFile that it raises passes the checkpoint over.

        Raises:
            DamagedFile: where there is none.
            ValueError: where it was written under another recipe, or in another space.
        """
        rounds, damaged = self.rounds(), list[str]()
        for number in reversed(rounds):
            try:
                trees = self._read(self._path(number), fresh)
                run, extra = trees["run"], trees["extra"]
                if check is not None:
                    check(run, extra)
            except (DamagedFile, WireError, OSError) as error:
                damaged.append(str(error))
                continue
            if damaged and self.rounds() != rounds:
                break
            try:
                agree(self.space, trees.get("space", {}))
            except ClientError as refusal:
                path = self._path(number)
                raise ValueError(f"{path} cannot be gone on with: {refusal}") from None
            return Resumed(run, extra, tuple(damaged))
        if damaged and self.rounds() != rounds:
            # They were not damaged: a run that goes on replaced them meanwhile.
            return self.load(fresh, check=check)
        if damaged:
            raise DamagedFile(
                f"no checkpoint in {self.folder} can be gone on from: {'; '.join(dict.fromkeys(damaged))};"
                " put back what is missing, or begin a new run"
            )
        raise DamagedFile(
            f"{self.folder} holds no checkpoint to resume from: put it back, or begin a new run"
        )

    def _read(self, path: Path, fresh: object) -> Mapping[str, Any]:
        header, payload = decode_with_header(read_hashed(path), max_bytes=None)
        types = {_type_name(kind): kind for kind in _types(fresh)}
        decoder, written = _Decoder(types, payload, str(path)), dict(header["trees"]["dict"])
        # What another recipe's run is made of may not be known here.
        self._compare(decoder.decode(written["settings"]), path)
        trees: Mapping[str, Any] = decoder.decode(header["trees"])
        return trees

    def _path(self, number: int) -> Path:
        return self.folder / f"round-{number:06d}.ckpt"

    def _compare(self, stored: Mapping[str, Any], path: Path) -> None:
        if self.settings is None:
            return
        was = {key: json.dumps(value) for key, value in stored.items() if self._counts(key)}
        now = {key: json.dumps(value) for key, value in self.settings.items() if self._counts(key)}
        changed = [
            f"{key} was {was.get(key, 'not set')} and is {now.get(key, 'not set')}"
            for key in sorted(was.keys() | now.keys())
            if was.get(key) != now.get(key)
        ]
        if changed:
            raise ValueError(
                f"{path} was written under another recipe, {'; '.join(changed)}: take the "
                "recipe it was written under, or begin a new run"
            )

    def _counts(self, key: str) -> bool:
        return self.sections is None or key.partition(".")[0] in self.sections


def state_sha256(value: Any) -> str:
    """Return the hash of a run, or of any part of one, bit for bit.

    Dicts count sorted by key, so that it does not depend on the order of insertion; -0.0 differs from 0.0.
    """
    digest = hashlib.sha256()
    for piece in _canonical(value):
        digest.update(piece)
    return digest.hexdigest()


def _canonical(value: Any) -> Iterator[bytes]:
    """Yield a prefix-free description."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        yield f"tensor {value.dtype} {list(value.shape)}\n".encode()
        yield flat.view(torch.uint8).numpy().tobytes()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield f"dataclass {type(value).__name__}\n".encode()
        yield from _canonical(_fields(value))
    elif isinstance(value, Mapping):
        yield f"dict {len(value)}\n".encode()
        for key in sorted(value, key=lambda key: (str(type(key)), key)):
            yield from _canonical(key)
            yield from _canonical(value[key])
    elif type(value) in (tuple, list):
        yield f"{type(value).__name__} {len(value)}\n".encode()
        for item in value:
            yield from _canonical(item)
    else:
        yield f"{type(value).__name__} {json.dumps(_leaf(value, 'the value'))}\n".encode()


def _encode(trees: Mapping[str, Any]) -> bytes:
    tensors: dict[str, torch.Tensor] = {}

    def tree(value: Any, path: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[str(len(tensors))] = value
            return {"tensor": str(len(tensors) - 1)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {name: tree(item, f"{path}.{name}") for name, item in _fields(value).items()}
            return {"type": _type_name(type(value)), "fields": fields}
        if isinstance(value, Mapping):
            if not all(type(key) in (str, int) for key in value):
                raise TypeError(f"{path} has keys that are neither str nor int: {list(value)[:3]}")
            return {"dict": [[key, tree(item, f"{path}.{key}")] for key, item in value.items()]}
        if type(value) in (tuple, list):
            items = [tree(item, f"{path}[{i}]") for i, item in enumerate(value)]
            return {type(value).__name__: items}
        return _leaf(value, path)

    return encode({"tensors": tensors}, {"trees": tree(trees, "checkpoint")})


def _leaf(value: Any, path: str) -> Any:
    if type(value) is bytes:
        return {"bytes": base64.b64encode(value).decode()}
    if type(value) in _SCALARS:
        return value
    raise TypeError(
        f"{path} is a {type(value).__name__}, a checkpoint holds frozen dataclasses, tuples, lists, "
        "dicts, numbers, strings, bytes and tensors"
    )


@dataclass(frozen=True, slots=True)
class _Decoder:
    types: Mapping[str, type]
    payload: Payload
    path: str

    def decode(self, tree: Any) -> Any:
        match tree:
            case {"tensor": name}:
                return self.payload["tensors"][name]
            case {"type": name, "fields": fields}:
                return self._dataclass(name, fields)
            case {"dict": pairs}:
                return {key: self.decode(item) for key, item in pairs}
            case {"tuple": items}:
                return tuple(self.decode(item) for item in items)
            case {"list": items}:
                return [self.decode(item) for item in items]
            case {"bytes": text}:
                return base64.b64decode(text)
        return tree

    def _dataclass(self, name: str, fields: Mapping[str, Any]) -> Any:
        kind = self.types.get(name)
        known = [f.name for f in dataclasses.fields(kind) if f.init] if kind else []
        if kind is None or set(known) != fields.keys():
            raise ValueError(
                f"{self.path} holds {name}({', '.join(fields)}), which this recipe's run does not "
                "have: resume with the fedloom and the recipe that wrote it"
            )
        return kind(**{key: self.decode(item) for key, item in fields.items()})


def _fields(value: Any) -> dict[str, Any]:
    return {f.name: attrgetter(f.name)(value) for f in dataclasses.fields(value) if f.init}


def _type_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _types(value: Any) -> Iterator[type]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield type(value)
        if isinstance(value, Holds):
            yield from value.holds
        for item in _fields(value).values():
            yield from _types(item)
    elif isinstance(value, Mapping | tuple | list):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _types(item)
