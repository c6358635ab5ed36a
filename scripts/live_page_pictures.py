"""Takes docs/img/live-page*.png from a running server: python scripts/live_page_pictures.py http://localhost:9000

Needs playwright and Debian's chromium. The pictures show a real conversation and the load of the page's own slider.
"""

from __future__ import annotations

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
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
