"""A headless Chromium that tests talk to."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A tab of a headless Chromium, driven over its DevTools protocol.

    Attributes:
        troubles: what it logged as errors or warnings, and uncaught exceptions.
        requests: every URL it asked for.
    """

    def __init__(self, profile: Path) -> None:
        self.websocket = pytest.importorskip("websocket", reason="pip install websocket-client")
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
        arguments += ["--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(
            [str(CHROMIUM), *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        port = profile / "DevToolsActivePort"
        self.until(lambda: port.is_file() and port.read_text().count("\n"), "chromium did not start")
        at, path = port.read_text().split()
        self.socket = self.websocket.create_connection(f"ws://127.0.0.1:{at}{path}", suppress_origin=True, timeout=60)
        self.numbers = itertools.count(1)
        self.session: dict[str, str] = {}
        self.troubles: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self.socket.close()
        self.process.terminate()
        self.process.wait(timeout=30)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol, and note the events that come in meanwhile."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters, **self.session}))
        while True:
            found = json.loads(self.socket.recv())
            if found.get("id") == number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            about = found.get("params", {})
            match found["method"]:
                case "Runtime.exceptionThrown":
                    self.troubles.append(str(about["exceptionDetails"]))
                case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                    self.troubles.append(str(about["args"]))
                case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                    self.troubles.append(str(about["entry"]))
                case "Network.requestWillBeSent":
                    self.requests.append(about["request"]["url"])

    def js(self, expression: str) -> Any:
        """The value of an expression in the page; promises are waited for."""
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def open(self, file: Path, width: int = 1280, height: int = 900) -> None:
        """Open a file in a window of this size, a phone's below 500, and wait until it is loaded."""
        phone = width < 500
        self.troubles.clear()
        self.requests.clear()
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": phone}
        self.send("Emulation.setDeviceMetricsOverride", **size)
        self.send("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.prefer("light")
        self.send("Page.navigate", url=file.resolve().as_uri())
        loaded = "document.readyState === 'complete' && location.protocol === 'file:'"
        self.until(lambda: self.js(loaded), "the page did not load")

    def prefer(self, scheme: str) -> None:
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def search(self, text: str) -> list[int]:
        """Type into the search field; the atoms that the list then shows."""
        self.js(f"search.value = {json.dumps(text)}; search.dispatchEvent(new Event('input'))")
        return self.listed()

    def listed(self) -> list[int]:
        return self.js("[...document.querySelectorAll('#list tbody tr')].map(row => Number(row.dataset.atom))")

    @staticmethod
    def until(ready: Callable[[], Any], otherwise: str, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            assert time.monotonic() < end, otherwise
            time.sleep(0.05)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()
