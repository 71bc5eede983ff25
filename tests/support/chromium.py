"""Drives a headless Chromium through its DevTools protocol."""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
START = 30.0  # seconds that a busy machine may take until the browser listens
KEYS = {"ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35,
        "Enter": 13, "Tab": 9, "Delete": 46}  # fmt: skip


def missing() -> str:
    """Returns why no browser can be driven here, or nothing."""
    try:
        import websocket  # noqa: F401
    except ImportError:
        return "needs websocket-client: pip install -e '.[test]'"
    return "" if found() else f"needs Chromium: none of {', '.join(NAMES)} is on the path"


def found() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


class Chromium:
    """Runs one browser with a profile of its own, and closes it at the end of a with block."""

    def __enter__(self) -> "Chromium":
        program = found()
        assert program
        self._profile = tempfile.mkdtemp(prefix="unimed_jax_chromium_")
        flags = [
            "--headless=new",
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
            f"--user-data-dir={self._profile}",
            "--no-first-run",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-extensions",
            "--disable-sync",
            "--mute-audio",
            "--hide-scrollbars",
            *(["--no-sandbox"] if os.geteuid() == 0 else []),  # the sandbox refuses root
        ]
        quiet = subprocess.DEVNULL
        own = os.environ | {"TMPDIR": self._profile}  # what it leaves there goes with the profile
        self._process = subprocess.Popen(
            [program, *flags, "about:blank"], stdout=quiet, stderr=quiet, env=own
        )
        file, end = Path(self._profile, "DevToolsActivePort"), time.monotonic() + START
        while not file.exists() or not file.read_text().strip():
            if self._process.poll() is not None or time.monotonic() > end:
                self.__exit__()
                raise RuntimeError(f"{program} did not start within {START:.0f} s")
            time.sleep(0.05)
        self._port = int(file.read_text().split()[0])
        return self

    def __exit__(self, *_) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._profile, ignore_errors=True)

    def page(self, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1) -> "Page":
        """Opens an empty tab of a size in CSS pixels."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}/json/new", method="PUT")
        with urllib.request.urlopen(request, timeout=START) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        return Page(address, width, height, dark, scale)


class Page:
    """Holds one tab: what it asked for (`requests`), what went wrong (`errors`), what it shows.

    requests: addresses in order; errors: texts of uncaught exceptions and of the console's errors.
    """

    def __init__(self, address: str, width: int, height: int, dark: bool, scale: float):
        import websocket

        self._socket = websocket.create_connection(address, timeout=60, max_size=None)
        self._last = 0
        self.requests: list[str] = []
        self.errors: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.call(f"{domain}.enable")
        self.resize(width, height, scale)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[theme])

    def close(self) -> None:
        self.call("Page.close")
        self._socket.close()

    def call(self, method: str, **parameters) -> dict:
        """Calls a method of the protocol and returns its result; events are read meanwhile."""
        self._last += 1
        self._socket.send(json.dumps({"id": self._last, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == self._last:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._event(message)

    def _event(self, message: dict) -> None:
        of = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.requests.append(of["request"]["url"])
            case "Runtime.exceptionThrown":
                details = of["exceptionDetails"]
                self.errors.append(details.get("exception", {}).get("description") or details["text"])
            case "Log.entryAdded" if of["entry"]["level"] == "error":
                self.errors.append(f"{of['entry']['text']} {of['entry'].get('url', '')}")
            case "Runtime.consoleAPICalled" if of["type"] in ("error", "assert"):
                self.errors.append(str([a.get("value", a.get("description")) for a in of["args"]]))

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height,
                  deviceScaleFactor=scale, mobile=width < 500)  # fmt: skip

    def open(self, address: str) -> None:
        self.call("Page.navigate", url=address)
        self.wait("document.readyState === 'complete'")

    def run(self, script: str):
        """Evaluates an expression, waits for a promise, and returns its JSON value."""
        out = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in out:
            raise RuntimeError(f"{script}: {out['exceptionDetails']['exception'].get('description')}")
        return out["result"].get("value")

    def wait(self, condition: str, seconds: float = 30) -> None:
        """Waits until an expression is true."""
        end = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                text = self.run("document.body.innerText")
                raise TimeoutError(f"{condition} is not true after {seconds} s; the page shows:\n{text}")
            time.sleep(0.03)

    def text(self, selector: str) -> str:
        element = f"document.querySelector({json.dumps(selector)})"
        return self.run(f"{element}?.innerText ?? {element}?.textContent ?? ''")  # the second: SVG

    def visible(self, selector: str) -> bool:
        return self.run(f"document.querySelector({json.dumps(selector)})?.checkVisibility() ?? false")

    def middle(self, selector: str) -> tuple[float, float]:
        """Scrolls an element into view and returns its middle in CSS pixels of the window."""
        frame = self.run(
            f"(async () => {{ const e = document.querySelector({json.dumps(selector)});"
            "e.scrollIntoView({block: 'center', behavior: 'instant'});"
            # until what was scrolled is drawn, clicks go where things were
            "await new Promise(drawn => requestAnimationFrame(() => requestAnimationFrame(drawn)));"
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return frame[0], frame[1]

    def click(self, selector: str) -> None:
        """Clicks with the mouse in the middle of an element, whatever lies there."""
        self.drag(self.middle(selector))

    def drag(self, *points: tuple[float, float]) -> None:
        """Presses at the first point, moves over the others and lets go at the last."""
        common = {"button": "left", "clickCount": 1}
        x, y = points[0]
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        self.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **common)
        for x, y in points[1:]:
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y, buttons=1, **common)
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, **common)

    def press(self, key: str, shift: bool = False) -> None:
        """Presses one key: a name of KEYS or a character."""
        of = {"key": key, "modifiers": 8 if shift else 0, "windowsVirtualKeyCode": KEYS.get(key, 0)}
        if len(key) == 1:
            of["text"] = key
        elif key == "Enter":
            of["text"] = "\r"
        self.call("Input.dispatchKeyEvent", type="keyDown", code=key, **of)
        self.call("Input.dispatchKeyEvent", type="keyUp", code=key, **of)

    def type(self, selector: str, text: str) -> None:
        """Replaces what stands in a field that can be seen."""
        field = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{field}.focus(), {field}.select()")
        assert self.run(f"document.activeElement === {field}"), f"{selector} cannot be typed into"
        if text:
            self.call("Input.insertText", text=text)
        else:
            self.press("Delete")

    def pick(self, selector: str, file: Path) -> None:
        """Puts a file into a file field, as its dialog would."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def drop(self, name: str, data: bytes, event: str = "drop") -> None:
        """Drops a file on the page, or pastes it."""
        of = {"drop": "DragEvent", "paste": "ClipboardEvent"}[event]
        carrier = {"drop": "dataTransfer", "paste": "clipboardData"}[event]
        self.run(
            f"(() => {{ const bytes = Uint8Array.from(atob('{base64.b64encode(data).decode()}'), c => "
            f"c.charCodeAt(0)); const files = new DataTransfer(); files.items.add(new File([bytes], "
            f"{json.dumps(name)})); document.body.dispatchEvent(new {of}('{event}', {{bubbles: true, "
            f"cancelable: true, {carrier}: files}})); }})()"
        )

    def picture(self, file: Path, whole: bool = False) -> None:
        """Writes what the window shows, or the whole page, as PNG."""
        out = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(out["data"]))

    def roles(self) -> list[tuple[str, str]]:
        """Returns the accessibility tree's (role, name), without plain text."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
            and node["role"]["value"] not in ("StaticText", "InlineTextBox", "generic", "none")
        ]
