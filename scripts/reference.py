"""Write docs/cli.md and docs/python-api.md from the code; ``tests/test_docs.py`` compares them.

    python scripts/reference.py

Each page has a mark, below which everything is made: commands and options by cyclopts, classes and functions by their
signatures and docstrings.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from echo_trt import errors
from echo_trt.cli.app import app
from echo_trt.engine import llm, params
from echo_trt.speculation import drafts, planner, policies, super_tree

ROOT = Path(__file__).parents[1]
MARK = "<!-- below: written by scripts/reference.py -->\n"
#: What a program calls of LLM; other members are for the doors of this package.
CALLED = ("generate", "chat", "stream", "stream_chat", "chat_ids", "sampling", "set_policy")
#: Members of a policy's classes that only this package needs.
INNER = ("reached", "with_roots", "best_paths", "checked", "on_one_path", "look_ahead")
#: A line of a docstring that explains a name: the name, two blanks or more, and text.
NAMED = re.compile(r"^([a-z_]+(?:, [a-z_]+)*)  +(\S.*)$")
API: dict[str, list[Any]] = {
    "Answering": [llm.LLM],
    "Results": [params.Completion, params.Delta, params.TokenLogprobs, params.TokenSource, errors.UserError],
    "Policies": [policies.policy, super_tree.SuperTree, drafts.Draft],
    "Planners": [planner.StepContext, planner.Plan, planner.Iteration],
}


def command_line() -> str:
    """Return each command with its arguments and options, as ``echo-trt COMMAND --help`` has them, each told once."""
    app.resolved_commands()  # of other packages, too
    text = app.generate_docs(output_format="markdown", heading_level=1)
    text = text[text.index("\n## echo-trt ") :].strip()  # behind the contents, which only list the headings
    text = re.sub(r"^(echo-trt[\w ]+?) -m \S+", r"\1", text, flags=re.MULTILINE)  # how Python itself was started
    text = text.replace("**[required]**", "Required.").replace("*[default: False]*", "")
    text = re.sub(r"\*\[(default|choices): (.*?)\]\*", lambda each: f"({each[1]}: {each[2]})", text)
    text = text.replace(' (default: "")', "").replace("**Parameters**:\n\n", "").replace("**Arguments**:\n\n", "")
    text = re.sub(r"```console\s+(.*?)\s+```", r"`\1`", text)
    lines = [line.rstrip() for line in text.splitlines()]
    listed = Counter(line for line in lines if line.startswith("* `"))
    common = [line for line, number in listed.items() if number > 1]
    sampled = [line for line in common if line.split("`")[1].split()[0][2:].replace("-", "_") in params.PARAMETERS]
    kept: list[str] = []
    for section in re.split(r"\n(?=##+ )", "\n".join(lines)):
        own, shared = [], []
        for line in section.splitlines():
            (shared if line in common else own).append(line)
        names = [f"`{re.split(r'[ ,`]', line[3:])[0]}`" for line in shared if line not in sampled]
        names += ["how to sample"] * any(line in sampled for line in shared)
        more = [f"\nAnd [in common](#options-in-common): {', '.join(names)}.\n"] * bool(names)
        kept += own + more
    kept += ["## Options in common\n", *(line for line in common if line not in sampled)]
    names = ", ".join(f"`{line.split('`')[1]}`" for line in sampled)
    kept.append(f"* {names}: as the [fields of a request](openai-api.md#fields-of-a-request).")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip() + "\n"


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
        if each.kind is each.VAR_KEYWORD:
            words.append(f"**{each.name}")
        elif each.name not in ("self", "cls") and each.kind is not each.VAR_POSITIONAL:
            plain = each.default is None or isinstance(each.default, bool | int | float | str | tuple)
            default = "" if each.default is each.empty else f"={each.default!r}" if plain else "=..."
            words.append(each.name + default)
    return f"{name}({', '.join(words)})"


def members(owner: type) -> Iterator[tuple[str, Any]]:
    """Yield the public methods and properties of a class that have a docstring, in the order of its source."""
    for name, member in vars(owner).items():
        called = getattr(member, "__func__", member)
        hidden = name.startswith("_") or name in INNER or (owner is llm.LLM and name not in CALLED)
        if not hidden and inspect.getdoc(called) and (callable(called) or isinstance(called, property)):
            yield name, called


def described(thing: Any) -> str:
    """Return a heading, a signature and the docstring of a function, or of a class and its members."""
    name = thing.__name__
    parts = [f"### {name}"]
    text = documented(thing)
    if not all(f"- `{field}`" in text for field in inspect.signature(thing).parameters):  # which the text lists
        parts.append(f"`{signature(name, thing)}`")
    parts.append(text)
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
        chapters += map(described, things)
    return "\n\n".join(chapters) + "\n"


PAGES: dict[str, Callable[[], str]] = {"docs/cli.md": command_line, "docs/python-api.md": python}


def written(name: str) -> str:
    """Return the text of a page as it should be."""
    return (ROOT / name).read_text().partition(MARK)[0] + MARK + "\n" + PAGES[name]()


if __name__ == "__main__":
    for name in PAGES:
        (ROOT / name).write_text(written(name))
