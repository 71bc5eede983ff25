"""Photographs the server's page with slices of the brain set, into docs/pictures.

`PYTHONPATH=.:tests python docs/make_page_pictures.py --run=runs/brain_tiny` serves the run on this
machine and drives Chromium. The answers are the model's, right or wrong.
"""

import argparse
import io
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from support import chromium

from unimed_jax.data.datasets.brain import draw_slices, icbm152

MOST = 150_000  # bytes of a picture
STARTS = 300.0  # seconds
WIDE, PHONE = (1180, 930), (360, 780)
AXIAL, CORONAL = "axial_-005_t1_01", "coronal_+024_t1_00"


@contextmanager
def served(run: str) -> Iterator[str]:
    """Serves a run, and gives the address once the model is ready."""
    command = [sys.executable, "-m", "unimed_jax.main", "serve", f"--run={run}", "--port=0"]
    with subprocess.Popen([*command, "--name=brain_tiny"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            found = re.search(r"http://\S+", server.stdout.readline())
            if found is None:
                raise SystemExit("the server did not start")
            end = time.monotonic() + STARTS
            while not ready(found[0]) and time.monotonic() < end:
                time.sleep(0.2)
            yield found[0]
        finally:
            server.terminate()


def ready(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/ready", timeout=10).status == 200
    except urllib.error.HTTPError:
        return False


def slices() -> dict[str, bytes]:
    """Returns slices of the test split as PNG: name -> bytes."""
    out = {}
    for piece in draw_slices(icbm152.load(), "test"):
        if piece.key in (AXIAL, CORONAL):
            file = io.BytesIO()
            Image.fromarray(piece.image).save(file, "PNG")
            out[piece.key] = file.getvalue()
    return out


class Photographer:
    """Opens the page in one tab, does what a person would, and writes what it shows."""

    def __init__(self, page: chromium.Page, address: str, out: Path):
        self.page, self.out = page, out
        page.open(address)
        page.wait("document.querySelector('[role=tab]')")

    def image(self, name: str, content: bytes) -> None:
        self.page.drop(f"{name}.png", content)
        self.page.wait("document.querySelector('#canvas image')?.getAttribute('href')")

    def ask(self, task: str, question: str = "", options: str = "") -> None:
        page = self.page
        page.click(f"#tab-{task}")
        if question:
            page.type("#question", question)
        if options:
            page.click("#more summary")
            page.type("#options", options)
            page.click("#more summary")
        self._send()
        if options:
            page.run("document.getElementById('options').value = ''")

    def identify(self, box: tuple[int, int, int, int]) -> None:
        self.page.click("#tab-identify")
        for name, value in zip(("x0", "y0", "x1", "y1"), box, strict=True):
            self.page.type(f"#{name}", str(value))
        self._send()

    def _send(self) -> None:
        before = self.page.run("document.querySelectorAll('.turn').length")
        self.page.click("#send")
        self.page.wait(f"document.querySelectorAll('.turn.done').length > {before}", 120)

    def photograph(self, name: str, whole: bool = False) -> None:
        self.page.run("document.activeElement.blur(), scrollTo(0, 0)")
        self.page.drag((2, 2))  # takes the mouse from what it hovers over
        file = self.out / f"page_{name}.png"
        self.page.picture(file, whole)
        small = Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.NONE)
        small.save(file, optimize=True)
        size = file.stat().st_size
        if size > MOST:
            raise SystemExit(f"{file} has {size} bytes, more than {MOST}")
        print(f"{file}: {small.width} x {small.height}, {size} bytes")


def photograph(browser: chromium.Chromium, address: str, out: Path) -> None:
    """Makes every picture of docs/page.md."""
    brain = slices()
    shown = Photographer(browser.page(*WIDE), address, out)
    shown.photograph("empty")
    shown.image(AXIAL, brain[AXIAL])
    shown.ask("vqa", "In which plane is this slice?", "axial, coronal, sagittal")
    shown.photograph("ask")
    shown.ask("refer", "left putamen")
    shown.photograph("find")
    shown.identify((24, 20, 29, 29))
    shown.page.click(".expert:nth-child(2) input")
    shown.photograph("identify")
    shown.page.click(".expert:nth-child(1) input")
    shown.ask("caption")
    shown.photograph("describe")
    shown.page.click("#clear")
    shown.image(CORONAL, brain[CORONAL])
    maps = "T1 image", "grey matter map", "white matter map"
    shown.ask("cls", "T1 image, grey matter map or white matter map?", ", ".join(maps))
    shown.photograph("classify")
    shown.ask("qa", "Which chapter holds Z 5 7 . 3 1?")
    shown.photograph("text")
    for name, size, dark in (("dark", WIDE, True), ("phone", PHONE, False)):
        shown = Photographer(browser.page(*size, dark=dark), address, out)
        shown.image(AXIAL, brain[AXIAL])
        shown.ask("refer", "left putamen")
        shown.photograph(name, whole=name == "phone")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--run", required=True, help="a finished run of configs/brain_tiny.py")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "pictures")
    known = options.parse_args()
    if missing := chromium.missing():
        raise SystemExit(missing)
    known.out.mkdir(parents=True, exist_ok=True)
    with served(known.run) as address, chromium.Chromium() as browser:
        photograph(browser, address, known.out)


if __name__ == "__main__":
    main()
