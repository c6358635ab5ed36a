"""Write docs/cli.md and docs/python-api.md from the code; ``tests/test_docs.py`` compares them.

    python scripts/reference.py

Each page has a mark, below which everything is made: commands and options by cyclopts, classes and functions by their
signatures and docstrings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from echo_trt import errors
from echo_trt.cli.app import app
from echo_trt.engine import llm, params
from echo_trt.speculation import drafts, planner, policies, super_tree
from echo_trt.speculation.goodput import settings

ROOT = Path(__file__).parents[1]
MARK = "<!-- below: written by scripts/reference.py -->\n"
#: What a program calls of LLM; other members are for the doors of this package.
CALLED = ("generate", "chat", "stream", "stream_chat", "chat_ids", "default_params", "set_policy")
#: A line of a docstring that explains a name: the name, two blanks or more, and text.
NAMED = re.compile(r"^([a-z_]+(?:, [a-z_]+)*)  +(\S.*)$")
API: dict[str, list[Any]] = {
    "Answering": [llm.LLM],
    "Results": [params.Completion, params.Delta, params.TokenLogprobs, params.TokenSource, errors.UserError],
    "Policies": [policies.policy, policies.Policy, super_tree.SuperTree, drafts.Draft, settings.GoodputTuning],
    "Planners": [planner],
}


def command_line() -> str:
    """Return each command with its arguments and options, as ``echo-trt COMMAND --help`` has them."""
    app.resolved_commands()  # of other packages, too
    text = app.generate_docs(output_format="markdown", heading_level=1)
    text = text[text.index("\n## ") :].strip()
    text = re.sub(r"^(echo-trt[\w ]+?) -m \S+", r"\1", text, flags=re.MULTILINE)  # how Python itself was started
    for title in ("Arguments", "Commands"):
        text = text.replace(f"**{title}**:\n", f"{title}:\n")
    text = text.replace("**Parameters**:\n", "Options:\n")
    return re.sub(r"\n{3,}", "\n\n", text.replace("```console", "```")) + "\n"


def documented(thing: Any) -> str:
    """Return a docstring as Markdown: aligned lines, NAME and its text, become a list."""
    lines: list[str] = []
    for line in (inspect.getdoc(thing) or "").splitlines():
        if named := NAMED.match(line):
            lines += [""] * bool(lines and lines[-1][:2] not in ("- ", "  ")) + [f"- `{named[1]}`: {named[2]}"]
        else:
            lines.append(line if not line.startswith("  ") or not lines[-1][:2].strip() else f"  {line.strip()}")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).replace("``", "`")


def signature(name: str, thing: Callable[..., Any]) -> str:
    """Return a call in one line, without types that the text of the parameters says anyway."""
    given = inspect.signature(thing)
    words = []
    for each in given.parameters.values():
        if each.name not in ("self", "cls") and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            plain = each.default is None or isinstance(each.default, bool | int | float | str | tuple)
            default = "" if each.default is each.empty else f"={each.default!r}" if plain else "=..."
            words.append(each.name + default)
    return f"{name}({', '.join(words)})"


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class that have a docstring, in the order of its source."""
    for name, member in vars(owner).items():
        called = getattr(member, "__func__", member)
        hidden = name.startswith("_") or (owner is llm.LLM and name not in CALLED)
        if not hidden and inspect.getdoc(called) and (callable(called) or isinstance(called, property)):
            yield name, called


def described(thing: Any) -> str:
    """Return a heading, a signature and the docstring of a function, or of a class and its members."""
    name = thing.__name__
    parts = [f"### {name}"]
    if thing is not settings.GoodputTuning:  # its fields are told one by one
        parts.append(f"```\n{signature(name, thing)}\n```")
    parts.append(documented(thing))
    if isinstance(thing, type):
        rows = []
        for member, called in members(thing):
            call = member if isinstance(called, property) else signature(member, called)
            rows.append(f"- **`{call}`** {' '.join(documented(called).partition(chr(10) * 2)[0].split())}")
        parts.append("\n".join(rows))
    return "\n\n".join(part for part in parts if part.strip())


def python() -> str:
    """Return the public names of Python by chapter."""
    chapters = []
    for title, things in API.items():
        chapters.append(f"## {title}")
        for thing in things:
            if isinstance(thing, ModuleType):
                chapters.append(documented(thing))
                own = [each for each in vars(thing).values() if getattr(each, "__module__", "") == thing.__name__]
                chapters += [described(each) for each in own if isinstance(each, type) and each.__doc__]
            else:
                chapters.append(described(thing))
    return "\n\n".join(chapters) + "\n"


PAGES: dict[str, Callable[[], str]] = {"docs/cli.md": command_line, "docs/python-api.md": python}


def written(name: str) -> str:
    """Return the text of a page as it should be."""
    return (ROOT / name).read_text().partition(MARK)[0] + MARK + "\n" + PAGES[name]()


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(written(name))
