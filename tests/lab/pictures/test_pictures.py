"""Plots that can be read: plain ticks, legends over nothing, colours for light and dark pages, one page around them."""

from __future__ import annotations

from collections.abc import Iterator
from html.parser import HTMLParser

from echo_trt_lab.pictures.by_load import accepted_length, drafted, iteration, speedup
from echo_trt_lab.pictures.page import Figures, Report
from echo_trt_lab.pictures.palette import PHASES
from echo_trt_lab.pictures.style import Picture

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
