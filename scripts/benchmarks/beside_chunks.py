"""What drafts beside a prompt's chunk cost first tokens: a policy that drafts there, and prompts that no set holds.

    python scripts/benchmarks/beside_chunks.py > docstrings.jsonl
    echo-trt bench BUNDLE --prompts docstrings.jsonl --policy-file scripts/benchmarks/beside_chunks.py \
        --policies goodput,goodput-beside-chunks,autoregressive --batch 1,2,4,8,16,32 --requests 64 --rounds 3 \
        --json beside_chunks.json

``goodput-beside-chunks`` asks its draft beside chunks of any length, as ``goodput`` did before it knew
``prompts_share``. The three take turns in one process. Compare ``ttft_ms`` p99, decode, whole requests and prefill of
the first two with plain decoding's. The prompts are docstrings of Python's standard library, each with one of three
tasks: 60 of up to 1,500 characters. Prefix hits: add ``--each-file`` runs of a file whose prompts begin alike.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
from collections.abc import Iterator
from dataclasses import replace

from echo_trt.speculation.goodput.settings import GoodputTuning
from echo_trt.speculation.policies import goodput_settings, policy, policy_named

MODULES = [
    "argparse",
    "asyncio",
    "collections",
    "contextlib",
    "csv",
    "dataclasses",
    "decimal",
    "difflib",
    "doctest",
    "email",
    "fractions",
    "functools",
    "gettext",
    "heapq",
    "html",
    "http.cookies",
    "inspect",
    "ipaddress",
    "json",
    "logging",
    "mailbox",
    "optparse",
    "pathlib",
    "pickle",
    "platform",
    "pprint",
    "queue",
    "random",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "sqlite3",
    "ssl",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "traceback",
    "typing",
    "unittest",
    "urllib.parse",
    "uuid",
    "weakref",
    "xml.dom",
    "zipfile",
]
TASKS = ("Summarise this in two sentences.", "What is this used for?", "Write three questions that this answers.")
SHORTEST, LONGEST, COUNT = 200, 1500, 60  # characters of a docstring, and prompts


@policy("goodput-beside-chunks", "goodput, and drafts beside chunks of any length", policy_named("goodput").shape)
def beside_chunks(name, settings, make_goodput):
    return make_goodput(name, replace(goodput_settings(name, settings), tuning=GoodputTuning(prompts_share=math.inf)))


def docstrings() -> Iterator[str]:
    """Yield docstrings of modules, their classes and functions."""
    for name in MODULES:
        module = importlib.import_module(name)
        for part in (module, *(each for _, each in sorted(vars(module).items(), key=lambda item: item[0]))):
            if part is module or getattr(part, "__module__", "") == name:
                text = inspect.getdoc(part) or ""
                if len(text) >= SHORTEST:
                    yield text[:LONGEST]


if __name__ == "__main__":
    texts = list(dict.fromkeys(docstrings()))
    for number, text in enumerate(texts[:: max(len(texts) // COUNT, 1)][:COUNT]):
        task = TASKS[number % len(TASKS)]
        print(json.dumps({"id": f"docstring-{number}", "prompt": f"{task}\n\n{text}"}))
