"""A page in headless Chromium, driven by the DevTools protocol over two pipes (fd 3 in, fd 4 out; messages end in NUL).

Source: https://chromedevtools.github.io/devtools-protocol/, `--remote-debugging-pipe`.
"""

import fcntl
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
)


class Browser:
    """One tab. `errors` collects uncaught exceptions, console errors and what the page's policy refused."""

    def __init__(self, folder: Path) -> None:
        theirs_in, self.to = os.pipe()
        self.come, theirs_out = os.pipe()
        ends = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 10) for fd in (theirs_in, theirs_out)]  # clear of 3 and 4
        self.process = subprocess.Popen(
            [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False,
            preexec_fn=lambda: [os.dup2(end, fd) for end, fd in zip(ends, (3, 4), strict=True)],
        )  # fmt: skip
        for fd in (theirs_in, theirs_out, *ends):
            os.close(fd)
        self.count, self.rest, self.events, self.errors, self.session = 0, b"", [], [], {}
        target = next(t for t in self.call("Target.getTargets")["targetInfos"] if t["type"] == "page")
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def receive(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            data = os.read(self.come, 1 << 20)
            if not data:
                raise OSError("Chromium has ended")
            self.rest += data
        message, self.rest = self.rest.split(b"\0", 1)
        message = json.loads(message)
        kind, params = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(params["exceptionDetails"])
        if kind == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            self.errors.append(params["entry"])
        return message

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": params, **self.session}
        os.write(self.to, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.count:
            self.events.append(answer.get("method"))
        assert "error" not in answer, answer
        return answer["result"]

    def wait(self, event: str) -> None:
        while event not in self.events:
            self.events.append(self.receive().get("method"))

    def open(self, file: Path, width: int = 1300, dark: bool = False) -> None:
        """Load a file and wait until it is drawn."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url="about:blank")
        self.load("Page.navigate", url=file.as_uri())

    def load(self, method: str, **params: Any) -> None:
        self.wait("Page.loadEventFired") if method == "Page.reload" else None
        self.events.clear()
        self.call(method, **params)
        self.wait("Page.loadEventFired")
        self.js("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def js(self, code: str) -> Any:
        """The value of an expression."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True, userGesture=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def mouse(self, kind: str, x: float, y: float, held: bool = False) -> None:
        """Kind is "Moved", "Pressed" or "Released"; x and y are in the window."""
        button = {"button": "left", "clickCount": 1} if kind != "Moved" else {}
        self.call("Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, buttons=int(held), **button)

    def drag(self, x0: float, y0: float, x1: float, y1: float) -> None:
        self.mouse("Moved", x0, y0)
        self.mouse("Pressed", x0, y0, True)
        self.mouse("Moved", (x0 + x1) / 2, (y0 + y1) / 2, True)
        self.mouse("Moved", x1, y1, True)
        self.mouse("Released", x1, y1)

    def close(self) -> None:
        self.session = {}
        try:
            self.call("Browser.close")
            self.process.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            self.process.kill()
            self.process.wait()
        for fd in (self.to, self.come):
            os.close(fd)
