"""Takes docs/img/live-page*.png from a running server: python scripts/live_page_pictures.py http://localhost:9000

Needs playwright and Debian's chromium. The pictures show a real conversation and the load of the page's own slider;
live-page-load.webp is a recording of the batch while that load rises.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

OUT = Path(__file__).parents[1] / "docs/img"
CHROMIUM = "/usr/bin/chromium"
LARGEST = 200_000  # bytes of a picture
#: name -> width, height, theme, prompt, beside plain decoding, requests of the load
PICTURES = {
    "live-page": (1360, 860, "light", "Why is the sky blue?", False, 6),
    "live-page-dark": (1360, 860, "dark", "Write a haiku about the sea.", True, 8),
    "live-page-phone": (360, 780, "light", "Why is the sky blue?", False, 2),
}
LOADS = (1, 2, 4, 8, 16, 32)


def take(page: Page, prompt: str, beside: bool, load: int) -> None:
    """Bring a page to the state that is pictured."""
    page.wait_for_selector('#state[data-state="live"]', timeout=60_000)
    page.evaluate("limit.value = 160")
    if beside:
        page.check("#beside")
    page.fill("#prompt", prompt)
    page.press("#prompt", "Enter")
    page.wait_for_selector("#stop:disabled", timeout=300_000)
    page.fill("#load", str(load))
    page.click("#load-switch")
    page.evaluate("window.scrollTo(0, 0)")
    page.wait_for_timeout(15_000)
    while not page.evaluate("Number(tree.dataset.nodes) > 2 * Number(tree.dataset.requests)"):
        page.wait_for_timeout(20)


def record(page: Page) -> None:
    """Write a recording of the batch: two views of each load, each of which is shown for a second."""
    page.wait_for_selector('#state[data-state="live"]', timeout=60_000)
    page.fill("#load", str(LOADS[0]))
    page.click("#load-switch")
    frames = []
    for load in LOADS:
        page.fill("#load", str(load))
        page.wait_for_timeout(5_000)
        for _ in range(2):
            page.evaluate("document.getElementById('batch').scrollIntoView()")
            view = page.screenshot(clip={"x": 0, "y": 0, "width": 780, "height": 760})
            frames.append(Image.open(io.BytesIO(view)).convert("RGB"))
            page.wait_for_timeout(1_500)
    first, *others = frames
    path = OUT / "live-page-load.webp"
    first.save(path, save_all=True, append_images=others, duration=1_000, loop=0, quality=70, method=6)
    assert path.stat().st_size < 2 * LARGEST, f"{path} is larger than {2 * LARGEST} bytes; make it smaller."


def main(url: str) -> None:
    OUT.mkdir(exist_ok=True)
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for name, (width, height, scheme, *state) in PICTURES.items():
            page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            page.goto(url)
            take(page, *state)
            path = OUT / f"{name}.png"
            page.screenshot(path=path)
            page.close()
            picture = Image.open(path).convert("RGB")
            picture.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(path, optimize=True)
            assert path.stat().st_size < LARGEST, f"{path} is larger than {LARGEST} bytes; make it smaller."
        page = browser.new_page(viewport={"width": 780, "height": 760})
        page.goto(url)
        record(page)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
