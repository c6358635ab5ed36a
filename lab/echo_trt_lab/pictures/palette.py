"""The colours of everything that shows figures. A colour means one thing wherever it is seen.

``SERIES`` are mid-tones: they have a contrast of 3 to 1 or more (WCAG's for graphics) on white and on dark pages, so
that a picture needs no second version. Text is in ``ink`` or ``soft`` of the page's theme.
"""

from __future__ import annotations

from echo_trt.speculation.sources import BOTH, DRAFT, DRAFT_SOURCES, GRAMMAR, LOOKUP, NGRAM

#: Who proposed a token -> colour. The target's own have none: they are in ``ink``.
SOURCES = {source.name: source.colour for source in DRAFT_SOURCES}
BLUE, GREEN, PURPLE, AMBER, PINK = (DRAFT_SOURCES[i].colour for i in (DRAFT, LOOKUP, BOTH, NGRAM, GRAMMAR))
TEAL, OLIVE, RED, GREY = "#0e96a8", "#8a8620", "#dd5144", "#717c88"

#: For what has no colour of its own, such as peers, in the order in which it comes.
SERIES = (PINK, TEAL, OLIVE, RED, PURPLE, AMBER, GREEN, BLUE)
#: Policy -> colour.
POLICIES = {
    "autoregressive": GREY,
    "goodput": BLUE,
    "goodput-exact": GREEN,
    "goodput-head": TEAL,
    "echo": AMBER,
    "static": PURPLE,
    "dense": PINK,
    "fixed": OLIVE,
    "oracle": RED,
}
#: Phase of an iteration -> colour. The two passes of networks stand out, the host's work is beside them.
PHASES = {"draft": AMBER, "verify": BLUE, "plan": PURPLE, "pack": TEAL, "accept": GREEN, "commit": OLIVE}
#: Theme -> the same hues, for text on a page: a contrast of 4.5 to 1 or more.
SOURCE_TEXTS = {
    theme: {source.name: source.texts[i] for source in DRAFT_SOURCES} for i, theme in enumerate(("light", "dark"))
}

#: Theme -> use -> colour of a page; the live page (``gateway/page/style.css``) has the same.
THEMES = {
    "light": {"paper": "#f5f6f8", "card": "#ffffff", "line": "#dde1e8", "ink": "#15181e", "soft": "#59616f"},
    "dark": {"paper": "#0e1014", "card": "#171a21", "line": "#2a2f3a", "ink": "#e7eaf0", "soft": "#9da6b5"},
}


def colours_of(names: list[str], known: dict[str, str] = POLICIES) -> dict[str, str]:
    """Give every name its colour: its own, or the next one of ``SERIES`` that none of them has."""
    taken = {known[name] for name in names if name in known}
    free = [colour for colour in SERIES if colour not in taken] or list(SERIES)
    others = [name for name in names if name not in known]
    return {name: known[name] if name in known else free[others.index(name) % len(free)] for name in names}


def stylesheet() -> str:
    """Return the themes as CSS variables, ``--ink`` and so on, by what the reader's system prefers; paper is light.

    Sources are ``--source-head`` and so on.
    """

    def variables(theme: str) -> str:
        sources = {f"source-{name}": colour for name, colour in SOURCE_TEXTS[theme].items()}
        return " ".join(f"--{name}: {colour};" for name, colour in (THEMES[theme] | sources).items())

    return (
        f":root {{ color-scheme: light dark; {variables('light')} }}\n"
        f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {variables('dark')} }} }}\n"
    )
