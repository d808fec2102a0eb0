"""A headless Chromium that a test drives through its pipe, without another package."""

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE = 120.0
"""Seconds for anything: the machine may be busy."""


class Browser:
    """One page."""

    def __init__(self, process: subprocess.Popen[bytes], to: int, back: int) -> None:
        self._process, self._to, self._back = process, to, back
        self._rest, self._last, self._session = b"", 0, ""
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the answer to a command; what happens meanwhile is in `events`."""
        self._last += 1
        asked: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            asked["sessionId"] = self._session
        os.write(self._to, json.dumps(asked).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") != self._last:
                self.events.append(told)
                continue
            assert "error" not in told, f"{method}: {told['error']}"
            return dict(told["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._back], [], [], PATIENCE)
            assert ready, "the browser does not answer"
            piece = os.read(self._back, 1 << 16)
            assert piece, "the browser has ended"
            self._rest += piece
        told, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(told))

    def open(self, url: str) -> None:
        """Go to a page."""
        failed = self.call("Page.navigate", url=url).get("errorText")
        assert not failed, failed
        self.until("location.href !== 'about:blank' && document.readyState === 'complete'")

    def value(self, script: str) -> Any:
        """Return what an expression comes to on the page, a promise once it is kept."""
        got = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in got, got["exceptionDetails"]
        return got["result"].get("value")

    def until(self, script: str) -> Any:
        """Return an expression's value as soon as it is true of the page."""
        deadline = time.monotonic() + PATIENCE
        while not (found := self.value(script)):
            assert time.monotonic() < deadline, f"never true: {script}"
            time.sleep(0.1)
        return found

    def complaints(self) -> list[str]:
        """Return errors of scripts and what the page's policy kept out; dialogs are errors too."""
        self.value("1")
        found = []
        for event in self.events:
            if event.get("method") in ("Runtime.exceptionThrown", "Page.javascriptDialogOpening"):
                found.append(json.dumps(event["params"])[:400])
            entry = event.get("params", {}).get("entry", {})
            if entry.get("level") == "error":
                found.append(f"{entry['text']} {entry.get('url', '')}")
        return found

    def picture(self, file: Path, *, width: int, height: int, dark: bool = False) -> None:
        """Write what is seen of the page as a PNG."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """Yield a browser, which is ended afterwards; skip the test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    (commands, to), (back, answers) = os.pipe(), os.pipe()
    # Chromium reads descriptor 3 and writes 4; these are above both.
    far = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (commands, answers)]
    words = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    words += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    words += [f"--user-data-dir={profile}", "--remote-debugging-pipe", "about:blank"]
    shell = ["bash", "-c", f'exec "$@" 3<&{far[0]} 4>&{far[1]}', "chromium", program, *words]
    with (profile.parent / "chromium.log").open("wb") as log:
        process = subprocess.Popen(shell, pass_fds=far, stdout=log, stderr=log)
    try:
        for fd in (commands, answers, *far):
            os.close(fd)
        yield Browser(process, to, back)
    finally:
        os.close(to)
        os.close(back)
        # Without its pipe it ends by itself.
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(20)
