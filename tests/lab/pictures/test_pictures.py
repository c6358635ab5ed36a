"""Plots that can be read: plain ticks, legends over nothing, colours for light and dark pages, one page around them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import echo_trt
from echo_trt.bundle.calibration import Calibration, Gate
from echo_trt_lab.calibration.plots import gates
from echo_trt_lab.pictures import palette
from echo_trt_lab.pictures.by_load import accepted_length, drafted, iteration, speedup
from echo_trt_lab.pictures.page import Figures, Report
from echo_trt_lab.pictures.palette import PHASES, SERIES, SOURCES, THEMES
from echo_trt_lab.pictures.style import Picture

GATES = (
    (1, 0.86, 0.86, True),
    (2, 0.83, 0.7, False),
    (3, 0.84, 0.4, True),
    (4, 0.85, 0.3, False),
    (5, 0.87, 0.2, True),
)
POLICIES = ("autoregressive", "goodput", "goodput-exact", "echo", "static", "dense", "fixed", "openvino-genai-eagle3")
BATCHES = (1, 2, 4, 8, 16, 32, 64)


def rows() -> list[dict]:
    return [
        {
            "policy": policy,
            "batch": batch,
            "ratio": 1 + at / 4,
            "ratio_spread": [1 + at / 5, 1 + at / 3],
            "accepted_length": 1 + at / 3,
            "verified_per_iteration": batch * (1 + at / 2),
            "phases_ms": dict.fromkeys(PHASES, 1.0 + at),
        }
        for batch in BATCHES
        for at, policy in enumerate(POLICIES)
    ]


def pictures() -> list[Picture]:
    return [speedup(rows()), accepted_length(rows()), drafted(rows()), iteration(rows())]


def luminance(colour: str) -> float:
    """Relative luminance of an sRGB colour, as WCAG defines it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read_on_light_and_dark_pages():
    """WCAG's contrast: 3 to 1 for graphics, 4.5 to 1 for text."""
    for name, theme in THEMES.items():
        for page in (theme["paper"], theme["card"]):
            for colour in (*SERIES, palette.GREY, *PHASES.values(), *SOURCES.values(), *palette.POLICIES.values()):
                assert contrast(colour, page) >= 3, (colour, page)
            for text in (theme["ink"], theme["soft"], *palette.SOURCE_TEXTS[name].values()):
                assert contrast(text, page) >= 4.5, (text, page)


def test_reports_have_the_live_page_s_colours():
    css = (Path(echo_trt.__file__).parent / "server" / "page" / "style.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    named = {"paper": "page", "card": "card", "line": "line", "ink": "text", "soft": "muted"}
    for block, theme in ((light, "light"), (dark, "dark")):
        page = dict(re.findall(r"--([\w-]+): (#\w{6});", block))
        assert {name: page[theirs] for name, theirs in named.items()} == THEMES[theme]
        assert {source: page[source] for source in SOURCES} == palette.SOURCE_TEXTS[theme]


def test_a_picture_says_by_itself_what_it_shows():
    """Its title, and the time of a token beside the time of an iteration, which drafts make longer."""
    written = re.findall(r"<!-- (.*) -->", iteration(rows()).file())
    assert {"Where the time goes", "ms per iteration", "ms per token of a request"} <= set(written)
    first = rows()[1]  # goodput at one request
    assert f" {(whole := sum(first['phases_ms'].values())):.1f}" in written
    assert f" {whole / first['accepted_length']:.1f}" in written
    gated = [Gate(depth=d, auc=a, samples=9, accepted=p, threshold=0.1, sweet_spot=s) for d, a, p, s in GATES]
    written = re.findall(r"<!-- (.*) -->", gates(Calibration.model_construct(gates=gated)).file())
    assert {"Where a gate is worth most", "first:", "always", "worth", "most", "next, 2 or", "more off"} <= set(written)


class Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.found.append((tag, dict(attrs)))

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.found)

    def links(self) -> Iterator[str]:
        return (value for _, attrs in self.found for name, value in attrs.items() if name in ("href", "src"))


def test_a_report_is_one_file_for_screens_and_printers():
    figures = Figures("Decoding", "x", ("batch", "policy"), [["1", "<b>"], ["2", "b"]], [1, 2], frozenset(("policy",)))
    html = Report("A & B", ["lead"], pictures(), [figures], {"machine": "m"}).html().decode()
    tags = Tags(html)
    assert tags.count("svg") == tags.count("figcaption") == 4
    assert tags.count("script") == tags.count("link") == tags.count("b") == 0
    assert not list(tags.links())
    assert html.index("Speedup by load") < html.index("Accepted length") < html.index("<table>")
    assert html.count('<tr class="begins">') == 1
    for words in ("A &amp; B", "prefers-color-scheme: dark", "@media print", "&lt;b&gt;", "--source-ngram"):
        assert words in html
