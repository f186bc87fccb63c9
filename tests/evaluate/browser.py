"""Headless Chromium for tests: its DevTools protocol over a pair of pipes, and no driver.

Messages are JSON that end in a zero byte; the browser reads file descriptor 3 and writes 4.
"""

import base64
import io
import json
import os
import select
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TIMEOUT_S = 180
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
#: What a page must cause none of
COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


class Browser:
    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._write_fd = os.pipe()
        self._read_fd, from_browser = os.pipe()
        self._process = subprocess.Popen(
            [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=_as_3_and_4(to_browser, from_browser),
            close_fds=False,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._unread = bytearray()
        self._id = 0
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        targets = self.send("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        attached = self.send("Target.attachToTarget", targetId=page, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Log", "Runtime", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self._id += 1
        message = {"id": self._id, "method": method, "params": params, **self._session}
        os.write(self._write_fd, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._id:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        """Shows a page; ``events`` are then only those that it caused."""
        self.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.events.clear()
        self.send("Page.navigate", url=path.as_uri())
        while not self._seen("Page.loadEventFired"):
            self.events.append(self._receive())

    def run(self, script: str) -> Any:
        """The value of an expression in the page; a promise is waited for."""
        answer = self.send(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def picture(self, selector: str) -> np.ndarray:
        """(H, W, 3) uint8 of an element as it shows."""
        box = self.run(
            "(element => { const b = element.getBoundingClientRect();"
            " return {x: b.x + scrollX, y: b.y + scrollY, width: b.width, height: b.height}; })"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        shot = self.send(
            "Page.captureScreenshot", clip={**box, "scale": 1}, captureBeyondViewport=True
        )
        image = Image.open(io.BytesIO(base64.b64decode(shot["data"])))
        return np.asarray(image.convert("RGB"))

    def complaints(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("method") in COMPLAINTS]

    def requested(self) -> list[str]:
        """Addresses that the page asked for, other than data URIs."""
        urls = [
            event["params"]["request"]["url"]
            for event in self.events
            if event.get("method") == "Network.requestWillBeSent"
        ]
        return [url for url in urls if not url.startswith("data:")]

    def close(self) -> None:
        self._session = {}
        try:
            self.send("Browser.close")
            self._process.wait(TIMEOUT_S)
        finally:
            self._process.kill()
            self._process.wait()
            os.close(self._write_fd)
            os.close(self._read_fd)

    def _seen(self, method: str) -> bool:
        return any(event.get("method") == method for event in self.events)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            ready, _, _ = select.select([self._read_fd], [], [], TIMEOUT_S)
            assert ready, f"chromium said nothing for {TIMEOUT_S} s"
            part = os.read(self._read_fd, 1 << 16)
            assert part, "chromium ended"
            self._unread += part
        message, _, rest = bytes(self._unread).partition(b"\0")
        self._unread = bytearray(rest)
        return json.loads(message)


def _as_3_and_4(to_browser: int, from_browser: int) -> Callable[[], None]:
    def move() -> None:
        # By way of high numbers: one of the two may itself be 3 or 4.
        os.dup2(to_browser, 203)
        os.dup2(from_browser, 204)
        os.dup2(203, 3)
        os.dup2(204, 4)
        os.close(203)
        os.close(204)

    return move
