"""A page in headless Chromium, by its DevTools protocol.

As a program, `python tests/helpers/chromium.py PAGE`, it says what each view found and leaves its
picture beside the page.
"""

import base64
import contextlib
import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

VIEWS = [(width, scheme) for width in (1440, 390) for scheme in ("light", "dark")]
_LIMIT = 90
"""Seconds for all views of a page; a browser that hangs is ended."""


def executable() -> str | None:
    """Where Chromium is, if it is installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@dataclasses.dataclass
class View:
    """A page as it was seen.

    Attributes:
      width, scheme: of the window, in CSS pixels, and "light" or "dark".
      requests: the URLs it asked for, its own first.
      console: what it or the browser said of it.
      content_width: of what it holds; more than `width` scrolls sideways.
      background: its colour.
      html: its elements after its scripts have run.
      picture: all of it, as PNG.
    """

    width: int
    scheme: str
    requests: list[str]
    console: list[str]
    content_width: int
    background: str
    html: str = dataclasses.field(repr=False)
    picture: bytes = dataclasses.field(repr=False)


class _DevTools:
    """Calls to a browser over its pipe, and the events that came in between."""

    def __init__(self, process: subprocess.Popen):
        self._process, self._last, self.events = process, 0, []

    def _read(self) -> dict:
        message = bytearray()
        while (byte := self._process.stdout.read(1)) != b"\0":
            if not byte:
                raise RuntimeError(f"Chromium ended, or took more than {_LIMIT} s")
            message += byte
        return json.loads(message)

    def call(self, method: str, session: str | None = None, **params: Any) -> dict:
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        message |= {"sessionId": session} if session else {}
        self._process.stdin.write(json.dumps(message).encode() + b"\0")
        self._process.stdin.flush()
        while (answer := self._read()).get("id") != self._last:
            self.events.append(answer)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(self._read())


@contextlib.contextmanager
def _devtools() -> Iterator[_DevTools]:
    """A browser that reads calls from descriptor 3 and answers on 4."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen(
            ["sh", "-c", 'exec "$0" "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1', executable(),
             "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        limit = threading.Timer(_LIMIT, process.kill)
        limit.start()
        try:
            yield _DevTools(process)
        finally:
            limit.cancel()
            process.kill()
            process.communicate()


def _text(event: dict) -> str | None:
    """What an event says of the console, if it does."""
    params = event["params"]
    if event["method"] == "Runtime.consoleAPICalled":
        return " ".join(str(a.get("value", a.get("description"))) for a in params["args"])
    if event["method"] == "Runtime.exceptionThrown":
        return json.dumps(params["exceptionDetails"])
    return params["entry"]["text"] if event["method"] == "Log.entryAdded" else None


def _view(tools: _DevTools, url: str, width: int, scheme: str, script: str) -> View:
    target = tools.call("Target.createTarget", url="about:blank")["targetId"]
    session = tools.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def call(method: str, **params: Any) -> dict:
        return tools.call(method, session, **params)

    def value(expression: str) -> Any:
        answer = call("Runtime.evaluate", expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(json.dumps(answer["exceptionDetails"]))
        return answer["result"].get("value")

    call(
        "Emulation.setDeviceMetricsOverride",
        width=width, height=900, deviceScaleFactor=1, mobile=width < 600,
    )  # fmt: skip
    media = [{"name": "prefers-color-scheme", "value": scheme}]
    call("Emulation.setEmulatedMedia", features=media)
    for domain in ("Network", "Runtime", "Log", "Page"):
        call(f"{domain}.enable")
    tools.events.clear()
    call("Page.navigate", url=url)
    tools.wait_for("Page.loadEventFired")
    value(script)
    view = View(
        width,
        scheme,
        requests=[],
        console=[],
        content_width=value("document.documentElement.scrollWidth"),
        background=value("getComputedStyle(document.body).backgroundColor"),
        html=value("document.documentElement.outerHTML"),
        picture=base64.b64decode(
            call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        ),
    )
    sent = [e["params"] for e in tools.events if e["method"] == "Network.requestWillBeSent"]
    view.requests += [params["request"]["url"] for params in sent]
    view.console += [text for event in tools.events if (text := _text(event))]
    tools.call("Target.closeTarget", targetId=target)
    return view


def look(page: pathlib.Path, script: str = "") -> list[View]:
    """Opens a page in each of VIEWS and runs a script in it."""
    with _devtools() as tools:
        return [_view(tools, page.absolute().as_uri(), *view, script) for view in VIEWS]


def main(page: str) -> None:
    path = pathlib.Path(page)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    for view in look(path):
        picture = path.with_name(f"{path.stem}-{view.width}-{view.scheme}.png")
        picture.write_bytes(view.picture)
        print(
            f"{view.width} px, {view.scheme}: content {view.content_width} px wide, "
            f"{len(view.requests) - 1} requests beside the page itself, "
            f"{len(view.console)} console messages; {picture}"
        )
        print(*view.requests[1:], *view.console, sep="\n", end="\n" if view.console else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
