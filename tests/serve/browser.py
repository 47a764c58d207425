"""A headless Chromium, driven over its debugging pipe: no library, no port."""

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
ANSWER_S = 30.0


def find() -> str | None:
    """The browser's path, if one is installed."""
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Page:
    """One page in a browser of its own."""

    def __init__(
        self, url: str, directory: Path, size: str = "1100,900", microphone: Path | None = None
    ) -> None:
        """`microphone`: a WAV file that the page hears when it records."""
        self._url = url
        self._microphone = microphone
        self._directory = directory
        self._size = size
        self._number = 0
        self.faults: list[str] = []
        """Messages that the page logged as errors, and requests that its policy stopped."""

    def __enter__(self) -> "Page":
        program = find()
        assert program is not None
        from_here, to_browser = os.pipe()
        from_browser, to_here = os.pipe()
        # The browser reads commands from descriptor 3 and writes answers to 4.
        script = f'exec "$0" "$@" 3<&{from_here} 4>&{to_here}'
        arguments = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            f"--window-size={self._size}",
            f"--user-data-dir={self._directory / 'browser'}",
        ]
        if self._microphone is not None:
            arguments += [
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
                f"--use-file-for-fake-audio-capture={self._microphone}%noloop",
            ]
        arguments.append("about:blank")
        self._process = subprocess.Popen(
            ["bash", "-c", script, program, *arguments],
            pass_fds=(from_here, to_here),
            stderr=subprocess.DEVNULL,
        )
        os.close(from_here)
        os.close(to_here)
        self._commands = os.fdopen(to_browser, "wb", buffering=0)
        self._answers = _messages(from_browser)
        target = self._send("Target.createTarget", url="about:blank", session=None)["targetId"]
        attached = self._send("Target.attachToTarget", targetId=target, flatten=True, session=None)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "DOM", "Log"):
            self._send(f"{domain}.enable")
        self._send("Page.navigate", url=self._url)
        return self

    def __exit__(self, *_: object) -> None:
        self._commands.close()
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, method: str, session: str | None = "", **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        until_s = time.monotonic() + ANSWER_S
        for answer in self._answers:
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]
            self._note(answer)
            assert time.monotonic() < until_s, method
        raise AssertionError("the browser went away")

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Runtime.exceptionThrown":
            self.faults.append(str(params["exceptionDetails"]))
        if event.get("method") == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.faults.append(params["entry"]["text"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        found = self._send("Runtime.evaluate", expression=script, returnByValue=True)
        return found["result"].get("value")

    def choose_file(self, selector: str, path: Path) -> None:
        """Puts a file into a file input."""
        root = self._send("DOM.getDocument")["root"]["nodeId"]
        node = self._send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self._send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def press(self, key: str) -> None:
        """Presses and releases a key."""
        text = {"Enter": "\r", "Tab": ""}[key]
        code = {"Enter": 13, "Tab": 9}[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        self._send("Input.dispatchKeyEvent", type="keyDown", text=text, **common)
        self._send("Input.dispatchKeyEvent", type="keyUp", **common)

    def prefer_dark(self) -> None:
        """As if the user's system were set to dark."""
        features = [{"name": "prefers-color-scheme", "value": "dark"}]
        self._send("Emulation.setEmulatedMedia", features=features)

    def screenshot(self, path: Path) -> None:
        """Saves what the page looks like as PNG."""
        found = self._send("Page.captureScreenshot", format="png")
        path.write_bytes(base64.b64decode(found["data"]))


def _messages(descriptor: int) -> Iterator[dict[str, Any]]:
    rest = b""
    with os.fdopen(descriptor, "rb", buffering=0) as pipe:
        while data := pipe.read(65_536):
            *whole, rest = (rest + data).split(b"\0")
            yield from map(json.loads, whole)
