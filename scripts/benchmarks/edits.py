"""Edits of files, with the file as the prediction of the answer, without one, and with another file in its place.

    python scripts/benchmarks/edits.py BUNDLE [--edits 8] [--tokens 300] [--raw]
    python scripts/benchmarks/edits.py --write edits.jsonl     # prompts for ``bench`` that ask for a name to be changed

A small model does not follow "rename x to y in this file". So each edit begins with the model's own plain answer to a
prompt that shows a function of Python's standard library, and the prediction is that answer before an edit: an
identifier has another name, a default is another, a call lacks an argument, or lines are missing. What is accepted is
what a model would accept that makes the edit, apart from the prompt. Prints tokens per pass, passes and seconds of one
request at a time, each as a ratio to plain decoding's; texts that are not plain decoding's fail, unless --raw.
"""

from __future__ import annotations

import argparse
import inspect
import json
import keyword
import random
import re
import statistics
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams

MODULES = ("textwrap", "shlex", "configparser", "heapq", "bisect", "fractions", "statistics", "string", "csv", "json")
WAYS = ("plain", "goodput", "predicted", "wrong")


def functions() -> list[str]:
    """Return the sources of the library's functions of 15 to 60 lines."""
    found = []
    for name in MODULES:
        for each in vars(__import__(name)).values():
            if inspect.isfunction(each) and each.__module__ == name:
                source = textwrap.dedent(inspect.getsource(each))
                if 15 <= source.count("\n") <= 60:
                    found.append(source)
    return found


def renaming(source: str) -> str:
    words = re.findall(r"\b[a-z_]{4,}\b", source)
    common = max(sorted(set(words) - set(keyword.kwlist)), key=words.count)
    return f"Rename {common} to renamed_value, and write the whole function:\n\n```python\n{source}```"


def renamed(text: str, draw: random.Random) -> str:
    """Give the identifier that occurs most often another name."""
    words = re.findall(r"\b[a-z_]{4,}\b", text)
    return re.sub(rf"\b{max(set(words), key=words.count)}\b", "renamed_value", text) if words else text


def other_default(text: str, draw: random.Random) -> str:
    """Change the values that are assigned first."""
    return re.sub(r"= ?(\w+)", "= 42", text, count=2)


def without_argument(text: str, draw: random.Random) -> str:
    """Take the last argument out of the first calls."""
    return re.sub(r", ?\w+\)", ")", text, count=2)


def without_lines(text: str, draw: random.Random) -> str:
    """Delete some lines in the middle."""
    lines = text.splitlines(keepends=True)
    first = draw.randrange(max(len(lines) * 2 // 3, 1))
    return "".join(lines[:first] + lines[first + max(len(lines) // 8, 1) :])


EDITS: tuple[Callable[[str, random.Random], str], ...] = renamed, other_default, without_argument, without_lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--write", type=Path, help="write prompts to this file, and measure nothing")
    parser.add_argument("--edits", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=300, help="of an answer, at most")
    parser.add_argument("--raw", action="store_true", help="take texts that differ, as bf16's may")
    args = parser.parse_args()
    if args.write:
        rows = [{"id": str(i), "prompt": renaming(source)} for i, source in enumerate(functions()[: args.edits])]
        args.write.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    llm, draw = LLM(args.bundle, "autoregressive", 1, note=print), random.Random(0)
    sources = functions()
    prompts = [
        [{"role": "user", "content": f"Write this function again, without changes:\n\n{source}"}]
        for source in (sources * (args.edits // len(sources) + 1))[: args.edits]
    ]
    params = SamplingParams(args.tokens, ignore_eos=False)
    wanted = [llm.chat(prompt, params)[0] for prompt in prompts]
    right = [EDITS[i % len(EDITS)](one.text, draw) for i, one in enumerate(wanted)]
    wrong = [wanted[i - 1].text for i in range(len(wanted))]
    taken: dict[str, list[tuple[int, int, float]]] = {way: [] for way in WAYS}
    for i, prompt in enumerate(prompts):
        for way in WAYS:
            llm.set_policy("autoregressive" if way == "plain" else "goodput")
            prediction = {"predicted": right[i], "wrong": wrong[i]}.get(way, "")
            before, begin = llm.counters.iterations, time.perf_counter()
            [answer] = llm.chat(prompt, replace(params, prediction=prediction))
            if answer.token_ids != wanted[i].token_ids and not args.raw:
                raise SystemExit(f"edit {i}, {way}: the text differs from plain decoding's")
            passes, seconds = llm.counters.iterations - before, time.perf_counter() - begin
            taken[way].append((len(answer.token_ids), passes, seconds))
    print(f"{'':10} {'tokens':>7} {'passes':>7} {'tokens/pass':>12} {'seconds':>8} {'passes less':>12} {'faster':>7}")
    for way, rows in taken.items():
        tokens, passes, seconds = (sum(column) for column in zip(*rows, strict=True))
        fewer, faster = (
            statistics.geometric_mean(plain[k] / row[k] for plain, row in zip(taken["plain"], rows, strict=True))
            for k in (1, 2)
        )
        print(
            f"{way:10} {tokens:7} {passes:7} {tokens / passes:12.2f} {seconds:8.1f} {fewer:11.2f}x {faster:6.2f}x",
            flush=True,
        )


if __name__ == "__main__":
    main()
