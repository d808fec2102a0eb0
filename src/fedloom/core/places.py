"""Places to write to, looked at before the work that is to be written there."""

from pathlib import Path


def file_name(name: str) -> str:
    """Return a run's name as the name of a file or folder of its own."""
    return name.replace("/", "-").replace("\\", "-")


def folder_at(path: Path, what: str) -> Path:
    """Return a path that is, or can become, a folder; `what` names the setting that gives it.

    Raises:
        ValueError: where it or a part of it is a file.
    """
    there = next((at for at in (path, *path.parents) if at.exists() or at.is_symlink()), path)
    if there.exists() and not there.is_dir():
        raise ValueError(f"{what} must be a folder, got {path}, where {there} is a file")
    return path


def file_at(path: Path, what: str, *, ends: tuple[str, ...] = ()) -> Path:
    """Return a path that can become a file in a folder that is there; `ends` are what its name may end in.

    Raises:
        ValueError: where it is a folder, its folder is not there, or its name ends otherwise.
    """
    if path.is_dir():
        raise ValueError(f"{what} must be a file, got {path}, which is a folder")
    if not path.parent.is_dir():
        raise ValueError(
            f"{what} must be in a folder that is there, got {path}: make {path.parent}"
        )
    if ends and path.suffix.lower() not in ends:
        raise ValueError(f"{what} must end in {' or '.join(ends)}, got {path}")
    return path
