"""Pages in a real browser: headless Chromium, spoken to over its debugging pipe, so nothing but the browser is needed.

One browser serves a whole test process; it starts with the first page (seconds) and ends with the process.

    >>> page = open_page(path, dark=True)
    >>> page.console, page.requests
    ([], [])
"""

from __future__ import annotations

import atexit
import base64
import itertools
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-extensions",
    "--disable-background-networking",
    "--remote-debugging-pipe",
]
DEADLINE = 60.0  # seconds for any one answer; a loaded machine is slow to start a browser
MOST_STOPS = 200


@dataclass(frozen=True)
class TabStop:
    """What has the focus after one press of Tab: its tag, its words (or its label), and whether a ring is drawn."""

    tag: str
    words: str
    ring: bool


@dataclass(frozen=True)
class BrowserPage:
    """What the browser made of a page.

    Args:
        dom: the document after its scripts ran.
        text: what a reader sees.
        console: errors and warnings, of scripts and of the browser.
        requests: every address asked for but the page's own.
        tab_stops: where the Tab key leads, in order.
        width: pixels that the content takes, more than the window's where the page must be scrolled sideways.
        background: the body's colour, "rgb(20, 23, 27)".
        screenshot: a PNG of the whole page.
    """

    dom: str
    text: str
    console: list[str]
    requests: list[str]
    tab_stops: list[TabStop]
    width: int
    background: str
    screenshot: Path


def open_page(path: Path, *, dark: bool = False, width: int = 1200) -> BrowserPage:
    """Open the file at `path` as a reader would; skips the test, with the reason, where no browser is installed."""
    browser = _browser()
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    return browser.open(path, dark=dark, width=width)


@cache
def _browser() -> _Browser | None:
    program = next(filter(None, map(shutil.which, NAMES)), None)
    return None if program is None else _Browser(program)


class _Browser:
    """Chromium at the end of two pipes: commands and events are JSON, each ended by a NUL byte."""

    def __init__(self, program: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sft-plugins-browser-"))
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        self.unread = b""
        to_browser, self.write_end = os.pipe()
        self.read_end, from_browser = os.pipe()

        def wire() -> None:  # the browser reads commands from 3 and writes to 4
            ends = os.dup(to_browser), os.dup(from_browser)  # copies: either may be 3 or 4 itself
            os.dup2(ends[0], 3)
            os.dup2(ends[1], 4)

        self.process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={self.folder}/profile", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            close_fds=False, preexec_fn=wire,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        atexit.register(self.close)

    def open(self, path: Path, *, dark: bool, width: int) -> BrowserPage:
        address = path.resolve().as_uri()
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

        def call(method: str, **params: Any) -> dict[str, Any]:
            return self.call(method, session=session, **params)

        def evaluate(expression: str) -> Any:
            return call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

        try:
            for domain in ("Page", "Runtime", "Log", "Network"):
                call(f"{domain}.enable")
            scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            call("Emulation.setEmulatedMedia", features=[scheme])
            call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
            self.events.clear()
            call("Page.navigate", url=address)
            self.wait_for("Page.loadEventFired")
            call("Runtime.evaluate", expression="new Promise(requestAnimationFrame)", awaitPromise=True)
            dom, text = evaluate("document.documentElement.outerHTML"), evaluate("document.body.innerText")
            content = evaluate("document.documentElement.scrollWidth")
            background = evaluate("getComputedStyle(document.body).backgroundColor")
            shot = self.folder / f"{path.stem}-{'dark' if dark else 'light'}-{width}-{next(self.numbers)}.png"
            taken = call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
            shot.write_bytes(base64.b64decode(taken["data"]))
            stops = _tab_stops(call, evaluate)
            return BrowserPage(
                dom, text, _console(self.events), _requests(self.events, address), stops, content, background, shot
            )
        finally:
            self.call("Target.closeTarget", targetId=target)

    def call(self, method: str, *, session: str | None = None, **params: Any) -> dict[str, Any]:
        """Send one command and return its answer; events that come meanwhile are kept."""
        number = next(self.numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self.write_end, json.dumps(message).encode() + b"\0")
        answer = self._next(lambda received: received.get("id") == number, what=method)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def wait_for(self, event: str) -> None:
        if not any(one["method"] == event for one in self.events):
            self._next(lambda received: received.get("method") == event, what=event)

    def _next(self, wanted: Callable[[dict[str, Any]], bool], *, what: str) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE
        while True:
            while b"\0" in self.unread:
                line, self.unread = self.unread.split(b"\0", 1)
                received = json.loads(line)
                if "method" in received:
                    self.events.append(received)
                if wanted(received):
                    return received
            ready, _, _ = select.select([self.read_end], [], [], max(0.0, until - time.monotonic()))
            block = os.read(self.read_end, 1 << 20) if ready else b""
            if not block:
                raise RuntimeError(f"the browser gave no answer to {what} (exit status {self.process.poll()})")
            self.unread += block

    def close(self) -> None:
        os.close(self.write_end)  # the browser ends when its pipe does
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


_FOCUSED = """(() => {
  const e = document.activeElement;
  if (!e || e === document.body || e === document.documentElement) return null;
  window.__seen = window.__seen || [];
  if (window.__seen.includes(e)) return null;
  window.__seen.push(e);
  const s = getComputedStyle(e);
  const words = (e.getAttribute('aria-label') || e.innerText || e.value || e.title || '').trim().slice(0, 80);
  return {tag: e.tagName.toLowerCase(), words, ring: s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) > 0};
})()"""


def _tab_stops(call: Callable[..., Any], evaluate: Callable[[str], Any]) -> list[TabStop]:
    """Press Tab until the focus leaves the page or comes round."""
    stops: list[TabStop] = []
    while len(stops) < MOST_STOPS:
        for kind in ("keyDown", "keyUp"):
            call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
        found = evaluate(_FOCUSED)
        if found is None:
            break
        stops.append(TabStop(**found))
    return stops


def _console(events: list[dict[str, Any]]) -> list[str]:
    found = []
    for event in events:
        params = event.get("params", {})
        if event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            found.append(" ".join(str(a.get("value", a.get("description"))) for a in params["args"]))
        elif event["method"] == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            found.append(details.get("exception", {}).get("description") or details["text"])
        elif event["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            found.append(params["entry"]["text"])
    return found


def _requests(events: list[dict[str, Any]], own: str) -> list[str]:
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [address for address in sent if address != own and not address.startswith("data:")]
