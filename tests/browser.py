"""A real Chromium, spoken to over its debugging pipe: pages are opened, measured and photographed.

Knows the DevTools protocol as far as a test of a page needs it; knows nothing of what is on the page.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60
# What sticks out of the window, boxes that scroll by themselves and what is in them left out
STICKS_OUT = """
[...document.querySelectorAll('body *')].filter(element => {
  const box = element.getBoundingClientRect();
  const outside = box.width && (box.right > innerWidth + 1 || box.left < -1);
  return outside && !element.closest('.scroll, nav, pre, svg');
}).map(element => element.outerHTML.slice(0, 80))
"""
# Contrast of the text with what lies behind it (WCAG 2, relative luminance), the worst of the page
CONTRAST = """
(() => {
  const parts = colour => colour.match(/[\\d.]+/g).map(Number);
  const light = colour => {
    const [r, g, b] = parts(colour).slice(0, 3).map(v => v / 255)
      .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = getComputedStyle(e).backgroundColor;
      if ((parts(colour)[3] ?? 1) > 0.99) return colour;
    }
    return 'rgb(255, 255, 255)';
  };
  let worst = [21, ''];
  const text =
    'h1, h2, h3, p, a, th, td, dt, dd, span, figcaption, summary, li, label, legend, small, code, button';
  for (const element of document.querySelectorAll(text)) {
    const [a, b] = [light(getComputedStyle(element).color), light(ground(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < worst[0]) worst = [ratio, element.outerHTML.slice(0, 80)];
  }
  return worst;
})()
"""
# the browser expects its pipe as file descriptors 3 and 4
CONNECT = """
import fcntl, os, sys
first, second = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(first, 3)
os.dup2(second, 4)
os.execvp(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The program, from $PESO_BROWSER or the path."""
    return os.environ.get("PESO_BROWSER") or next((found for n in NAMES if (found := shutil.which(n))), None)


class Browser:
    """One page at a time. ``problems``: what the page's scripts and the browser complained about, and
    requests for addresses that do not begin with ``allowed``."""

    def __init__(self, process: subprocess.Popen[bytes], to: Any, back: Any) -> None:
        self.process, self._to, self._back = process, to, back
        self._number = 0
        self.problems: list[str] = []
        self.allowed = "file:"
        self._events: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if hasattr(self, "_session"):
            message["sessionId"] = self._session
        self._to.write(json.dumps(message).encode() + b"\0")
        self._to.flush()
        while (answer := self._read()).get("id") != self._number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def _read(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._back.read(1)) != b"\0":
            if not byte:
                raise RuntimeError(f"the browser ended with status {self.process.wait()}")
            text += byte
        message: dict[str, Any] = json.loads(text)
        told, method = message.get("params", {}), message.get("method", "")
        self._events.append(method)
        if method == "Runtime.exceptionThrown":
            self.problems.append(f"script error: {told['exceptionDetails']}")
        elif method == "Log.entryAdded" and told["entry"]["level"] == "error":
            self.problems.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
        elif method == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert"):
            self.problems.append(f"console: {told['args']}")
        elif method == "Network.requestWillBeSent" and not told["request"]["url"].startswith(self.allowed):
            self.problems.append(f"asked for {told['request']['url']}")
        return message

    def open(self, page: Path | str, width: int, height: int, scheme: str, *, phone: bool = False) -> None:
        """Show a file or an address in a window of this size, in the light or dark scheme."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=2 if phone else 1,
            mobile=phone,
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self.send("Page.navigate", url=page if isinstance(page, str) else page.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._read()

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression on the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def photograph(self, file: Path, *, whole: bool = False) -> None:
        shot = self.send("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium(program: str, profile: Path) -> Iterator[Browser]:
    """A browser without a window and without a network, ended afterwards. ``profile``: an empty folder."""
    read_by_it, to = os.pipe()
    back, written_by_it = os.pipe()

    process = subprocess.Popen(
        [
            *(sys.executable, "-c", CONNECT, str(read_by_it), str(written_by_it)),
            program,
            "--headless=new",
            "--remote-debugging-pipe",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-extensions",
            "--no-first-run",
            "--hide-scrollbars",
            "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={profile}",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(read_by_it, written_by_it),
        start_new_session=True,
    )
    os.close(read_by_it)
    os.close(written_by_it)
    try:
        with os.fdopen(to, "wb") as sending, os.fdopen(back, "rb", buffering=0) as receiving:
            yield Browser(process, sending, receiving)
    finally:
        process.terminate()
        try:
            process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        missing = "no Chromium: install the Debian package chromium, or name one in $PESO_BROWSER"
        if os.environ.get("PESO_REQUIRE_BROWSER"):
            pytest.fail(missing)
        pytest.skip(missing)
    with chromium(program, tmp_path_factory.mktemp("profile")) as started:
        yield started
