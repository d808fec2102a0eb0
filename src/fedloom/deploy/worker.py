"""The process of a resident worker: `python -m fedloom.deploy.worker SETTINGS SOCKET`."""

import contextlib
import sys
from pathlib import Path

from fedloom.deploy.group import SharingOut
from fedloom.deploy.site import Site
from fedloom.deploy.site_settings import SiteSettings
from fedloom.engines.flower.pipe import serve


def main() -> None:
    """Answer envelopes until the process that started this one ends."""
    settings = SiteSettings.read(Path(sys.argv[1]))
    serve(Path(sys.argv[2]), Site(settings, _say, SharingOut(settings)).answer)


def _say(words: str) -> None:
    # Where the disk is full the answer still has to go out, which says so.
    with contextlib.suppress(OSError):
        # Marked, as libraries write here too.
        sys.stdout.write(f"site\t{words}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
