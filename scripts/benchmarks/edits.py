"""Edits of files, with the file as the prediction of the answer, without one, and with another file in its place.

    python scripts/benchmarks/edits.py BUNDLE [--edits 60] [--tokens 300] [--follows] [--raw]
    python scripts/benchmarks/edits.py --write edits.jsonl     # the questions of --follows, as prompts for ``bench``

The files are Python's standard library's, the edits in turn: rename an identifier, change a default, add an argument,
delete a function; the whole file is written again. A small model does not follow "rename x to y in this file", so by
default the answer is what the model writes when it is asked for the file as it is, and the prediction is that answer
before an edit: what is accepted is what a model would accept that makes the edit, apart from the prompt. With --follows
the prompt asks for the edit, and the prediction is the file.

Prints, after every 20 edits, tokens per pass, passes and seconds of one request at a time, whose prompt is cached, with
the geometric mean of the edits' ratios to plain decoding's. Texts that are not plain decoding's fail, unless --raw,
which counts them.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import re
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams

WAYS = ("plain", "goodput", "predicted", "wrong")
SHORTEST, LONGEST = 500, 1400  # characters of a file
EXTRA = '\n\ndef describe(value, *others):\n    """Say what a value is."""\n    return f"{type(value)}: {others}"\n'


def files(count: int) -> list[str]:
    """Return ``count`` files of the library that define a function with arguments, from all over it."""
    library = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in sorted(library.rglob("*.py")) if not {"site-packages", "test", "tests"} & {*path.parts}]
    texts = [path.read_text("utf-8", "replace") for path in paths if SHORTEST <= path.stat().st_size <= LONGEST]
    suited = [text for text in texts if text.isascii() and any(functions(text))]
    return (suited * (count // len(suited) + 1))[:: max(len(suited) // count, 1)][:count]


def functions(text: str) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a file that have arguments."""
    yield from (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef) and node.args.args)


def most_used(text: str) -> str:
    words = re.findall(r"\b[a-z_]{4,}\b", text)
    return max(dict.fromkeys(words), key=words.count) if words else "self"


def renamed(text: str) -> str:
    """Give the identifier that occurs most often another name."""
    return re.sub(rf"\b{most_used(text)}\b", "renamed_value", text)


def other_default(text: str) -> str:
    """Change the values that are assigned first."""
    return re.sub(r"= ?(\w+)", "= 42", text, count=2)


def without_argument(text: str) -> str:
    """Take the last argument out of the first calls."""
    return re.sub(r", ?\w+\)", ")", text, count=2)


def with_function(text: str) -> str:
    """Have one function more, behind a line in the middle that is empty."""
    gaps = [gap.start() for gap in re.finditer(r"\n\n", text)] or [len(text)]
    return text[: gaps[len(gaps) // 2]] + EXTRA + text[gaps[len(gaps) // 2] :]


#: An edit's question, by the file and its functions, and what undoes its effect on an answer.
EDITS: tuple[tuple[Callable[[str, str], str], Callable[[str], str]], ...] = (
    (lambda text, name: f"Rename {most_used(text)} to renamed_value", renamed),
    (lambda text, name: f"Give the last argument of the function {name} the default 42", other_default),
    (lambda text, name: f"Give the function {name} one more argument, verbose=False", without_argument),
    (lambda text, name: f"Delete the function {name}", with_function),
)


def questions(texts: list[str], follows: bool) -> list[str]:
    asked = []
    for number, text in enumerate(texts):
        name = random.Random(number).choice([each.name for each in functions(text)])
        edit = EDITS[number % len(EDITS)][0](text, name) if follows else "Change nothing"
        asked.append(f"{edit} in this file, and write the whole file again, without a comment of yours:\n\n{text}")
    return asked


def show(taken: dict[str, list[tuple[int, int, float]]], differ: dict[str, int]) -> None:
    """Print a table of each way's tokens, passes and seconds by edit, and of its texts that differ."""
    print(f"{'':10} {'tokens':>7} {'passes':>7} {'tokens/pass':>12} {'seconds':>8} {'faster':>8} {'other texts':>12}")
    for way, rows in taken.items():
        tokens, passes, seconds = (sum(column) for column in zip(*rows, strict=True))
        faster = statistics.geometric_mean(
            plain[2] * row[0] / row[2] / plain[0] for plain, row in zip(taken["plain"], rows, strict=True)
        )
        print(
            f"{way:10} {tokens:7} {passes:7} {tokens / passes:12.2f} {seconds:8.1f} {faster:7.2f}x {differ[way]:12}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?")
    parser.add_argument("--write", type=Path, help="write prompts to this file, and measure nothing")
    parser.add_argument("--edits", type=int, default=60)
    parser.add_argument("--tokens", type=int, default=300, help="of an answer, at most")
    parser.add_argument("--follows", action="store_true", help="ask for the edit, and predict the file")
    parser.add_argument("--raw", action="store_true", help="take texts that differ, as bf16's may")
    parser.add_argument("--costs", type=Path, help="file that keeps what passes cost on this machine")
    args = parser.parse_args()
    if args.write:
        rows = [{"id": str(i), "prompt": each} for i, each in enumerate(questions(files(args.edits), follows=True))]
        args.write.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    llm, params = LLM(args.bundle, "goodput", 1, note=print, costs=args.costs), SamplingParams(args.tokens)
    texts, differ = files(args.edits), dict.fromkeys(WAYS, 0)
    taken: dict[str, list[tuple[int, int, float]]] = {way: [] for way in WAYS}
    for number, question in enumerate(questions(texts, args.follows)):
        prompt, predictions, wanted = llm.chat_ids(question), dict.fromkeys(WAYS, ""), None
        llm.generate([prompt], SamplingParams(1))  # all ways find the prompt in the prefix cache
        for way in WAYS:
            llm.set_policy("autoregressive" if way == "plain" else "goodput")
            before, begin = llm.counters.copy(), time.perf_counter()
            [answer] = llm.generate([prompt], replace(params, prediction=predictions[way]))
            seconds, passes = time.perf_counter() - begin, llm.counters.iterations - before.iterations
            taken[way].append((len(answer.token_ids), passes, seconds))
            if wanted is None:
                wanted, undone = answer, EDITS[number % len(EDITS)][1]
                right = texts[number] if args.follows else undone(wanted.text)
                predictions |= {"predicted": right, "wrong": texts[number - 1]}
            differ[way] += answer.token_ids != wanted.token_ids
            if differ[way] and not args.raw:
                raise SystemExit(f"edit {number}, {way}: the text differs from plain decoding's")
        if number % 20 == 19 or number == args.edits - 1:
            show(taken, differ)


if __name__ == "__main__":
    main()
