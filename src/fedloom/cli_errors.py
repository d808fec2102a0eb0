"""What becomes of an error: a user's is one sentence, ours says so and leaves its traceback in a file."""

import errno
import linecache
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import metadata, requires, version
from pathlib import Path
from types import TracebackType

from fedloom.cli_console import complain

USER, OURS, STOPPED = 2, 1, 130
_PACKAGE = str(Path(__file__).parent)
_folder: list[Path] = []
"""Of the run that the command is about, once it is known."""


def about(folder: Path) -> None:
    """Note the folder of the run that a command is about: tracebacks are kept there."""
    _folder[:] = [folder]


def guard(command: Callable[[], object], words: Sequence[str]) -> int:
    """Run a command and return its exit code; errors are told, with FEDLOOM_DEBUG set they are raised.

    Args:
        command: What to run; it may raise SystemExit.
        words: What was typed behind `fedloom`.
    """
    _folder.clear()
    try:
        code = _run(command, words)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence()
        return OURS
    except OSError as error:
        if os.environ.get("FEDLOOM_DEBUG"):
            raise
        complain(_file_error(error))
        _silence()
        return USER
    return code


def _run(command: Callable[[], object], words: Sequence[str]) -> int:
    try:
        for place, word in enumerate(words, 1):
            if not word.strip():
                raise ValueError(
                    f"argument {place} of the command is empty: give it a value, or leave it out"
                )
        command()
    except SystemExit as end:
        if end.code == STOPPED:  # as typer puts an interrupt
            return _stopped()
        return end.code if isinstance(end.code, int) else 0 if end.code is None else USER
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:
        raise
    except Exception as error:
        if os.environ.get("FEDLOOM_DEBUG"):
            raise
        return _tell(error)
    return 0


def _stopped() -> int:
    complain("stopped; `fedloom resume` goes on from the last finished round")
    return STOPPED


def _tell(error: Exception) -> int:
    if _is_memory(error):
        complain(
            f"out of memory ({_first_line(error)}): lower local.batch_size, evaluation.batch_size or data.max_length,"
            " set model.gradient_checkpointing to true or model.dtype to bfloat16, or take a smaller model"
        )
        return USER
    if isinstance(error, OSError) and error.errno is not None:
        complain(_file_error(error))
        return USER
    if isinstance(error, ModuleNotFoundError) and (extra := _extra_of(error.name or "")):
        complain(f"{error.name} is not installed: pip install 'fedloom[{extra}]'")
        return USER
    message = f"{error}" or type(error).__name__
    if _is_worded(error):
        complain(message)
        return USER
    log = _keep(error)
    where = f" ({log} has the details)" if log else ""
    if isinstance(error, ValueError | OSError) and not _is_here(error):
        complain(f"{message.rstrip('.')}{where}")
        return USER
    complain(
        f"this is a fault of fedloom, not of what it was given ({type(error).__name__}: {_first_line(error)});"
        f" please report it {_tracker()}" + (f" with {log}, which has the details" if log else "")
    )
    return OURS


def _is_memory(error: BaseException) -> bool:
    text = str(error).lower()
    signs = ("out of memory", "defaultcpuallocator", "can't allocate memory")
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in signs)
    )


def _is_worded(error: Exception) -> bool:
    """Return whether a `raise` of this package made the error for a user: a ValueError, OSError or ClientError."""
    # By name: core.protocols would load torch.
    refused = (
        f"{type(error).__module__}.{type(error).__name__}" == "fedloom.core.protocols.ClientError"
    )
    if not isinstance(error, ValueError | OSError) and not refused:
        return False
    place = _last(error.__traceback__)
    if place is None or not place[0].startswith(_PACKAGE):
        return False
    return linecache.getline(*place).strip().startswith("raise ")


def _extra_of(module: str) -> str:
    """Return the extra of the package that brings a module, empty where none does."""
    for line in requires("fedloom") or ():
        spec, _, marker = line.partition(";")
        name = re.split(r"[^\w.-]", spec.strip())[0].replace("-", "_").lower()
        extra = re.search(r"extra == \W(\w+)", marker)
        if extra and extra[1] != "dev" and name == module.split(".")[0].lower():
            return extra[1]
    return ""


def _is_here(error: Exception) -> bool:
    place = _last(error.__traceback__)
    return place is not None and place[0].startswith(_PACKAGE)


def _last(trace: TracebackType | None) -> tuple[str, int] | None:
    """Return file and line where an error was raised."""
    found = None
    while trace is not None:
        found = (trace.tb_frame.f_code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return found


def _file_error(error: OSError) -> str:
    """Return one sentence of an error of the operating system."""
    if error.errno is None or not error.strerror:
        return str(error) or type(error).__name__
    remedies = {
        errno.ENOSPC: "make room there, or write elsewhere",
        errno.EDQUOT: "make room there, or write elsewhere",
        errno.EACCES: "its rights do not let you; change them, or take another place",
        errno.EPERM: "its rights do not let you; change them, or take another place",
        errno.EROFS: "it cannot be written to; take another place",
    }
    what = f"{error.filename}: " if error.filename is not None else ""
    remedy = remedies.get(error.errno)
    reason = f"{error.strerror[:1].lower()}{error.strerror[1:]}"
    return f"{what}{reason}" + (f": {remedy}" if remedy else "")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _keep(error: Exception) -> Path | None:
    """Write the traceback to a new file in the run's folder, else here, else where temporary files go."""
    text = (
        f"fedloom {version('fedloom')}, python {sys.version.split()[0]}: {' '.join(sys.argv[1:])}\n\n"
        + "".join(traceback.format_exception(error))
    )
    name = time.strftime("fedloom-error-%Y%m%d-%H%M%S")
    for file in _places(name):
        try:
            with file.open("x", encoding="utf-8", errors="backslashreplace") as out:
                out.write(text)
        except OSError:
            continue
        return file
    return None


def _places(name: str) -> Iterator[Path]:
    for folder in (*_folder, Path(), Path(tempfile.gettempdir())):
        if folder.is_dir():
            yield from (folder / f"{name}{more}.log" for more in ("", *(f"-{n}" for n in range(9))))


def _tracker() -> str:
    urls = (line.partition(", ") for line in metadata("fedloom").get_all("Project-URL") or ())
    known = {label.lower(): url for label, _, url in urls}
    found = [known[label] for label in ("issues", "repository", "homepage") if label in known]
    return f"at {found[0]}" if found else "to whom you have it from"


def _silence() -> None:
    """Point the output nowhere, so that what is left of it does not fail again as Python ends."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # no descriptor: nothing that Python would flush
        return
