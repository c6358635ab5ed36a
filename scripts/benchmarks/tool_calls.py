"""Tokens per pass of tool calls: by prompt lookup, and with what declared tools tell of a call beside it.

    python scripts/benchmarks/tool_calls.py BUNDLE [--nodes 16,6,4,2]

Replays the calls of ``tool_calls.jsonl``, five agents' loops of six calls in Hermes' form, with the bundle's tokenizer
and chat template, and no network: what is accepted of a draft is what the recorded call says. The best nodes of a
request are verified, at most as many as --nodes; under load a request gets few.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.lookup import LookupDrafter
from echo_trt.engine.sources.calls import CallSource, skeleton
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.server.tool_formats.marked import HERMES, Marked
from echo_trt.speculation.goodput.optimiser.merge import merge
from echo_trt.speculation.super_tree import SuperTree

LOOPS = Path(__file__).with_suffix(".jsonl")
MATCH, ACCEPTANCE = 2, (0.2, 0.4, 0.6, 0.75)  # of prompt lookup, as in recipes
LENGTH = 8  # of a copy
LEAST = 0.1  # P(accept) of a node that is verified
SYSTEM = "You are a helpful assistant. Call the tools to do what the user wants."


def calls(bundle: Path) -> Iterator[tuple[list[int], list[int], np.ndarray]]:
    """Yield the prompt of each call, the call, and the skeleton of its tools, in tokens."""
    tokenizer, form = load_tokenizer(bundle), Marked(HERMES)
    chat = ChatEncoder(tokenizer, False)
    for loop in map(json.loads, LOOPS.read_text("utf-8").splitlines()):
        functions = [tool["function"] for tool in loop["tools"]]
        parts = [form.parts(each["name"], each["parameters"]) for each in functions]
        known = skeleton([[tokenizer.encode(part, add_special_tokens=False) for part in each] for each in parts])
        messages: list[dict[str, Any]] = [{"role": "system", "content": SYSTEM}]
        for turn in loop["turns"]:
            call = {"name": turn["name"], "arguments": turn["arguments"]}
            messages.append({"role": "user", "content": turn["user"]})
            text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
            prompt = [*map(int, chat.ids(messages, loop["tools"], None))]
            yield prompt, tokenizer.encode(text, add_special_tokens=False), known
            asked = {"id": "c", "type": "function", "function": call}
            messages.append({"role": "assistant", "content": "", "tool_calls": [asked]})
            messages.append({"role": "tool", "tool_call_id": "c", "content": turn["result"]})


def passes(prompt: list[int], answer: list[int], known: np.ndarray, nodes: int, draws: bool) -> int:
    """Count the passes that write ``answer``, of which the first is the prompt's own."""
    batch = InputBatch(1, len(prompt) + len(answer) + 1, 64, 1)
    text = np.array([*prompt, *answer], np.int32)
    batch.tokens[0, : len(text)], batch.prompt_length[0], batch.calls[0] = text, len(prompt), known
    lookup, source = LookupDrafter(batch, MATCH, ACCEPTANCE), CallSource(batch)
    load, done, count = SimpleNamespace(slots=np.zeros(1, np.int64)), 1, 1
    while done < len(answer):
        batch.length[0] = len(prompt) + done
        found = [lookup.chains(load.slots, LENGTH), *([source.propose(load)] if draws else ())]
        tree = SuperTree.from_roots(np.array([answer[done - 1]]))
        merge(tree, np.ones(1), found, np.array([64])).join(tree)
        best = set(np.lexsort((tree.depth, -tree.score))[: nodes + 1].tolist())
        at = 0
        while done < len(answer):
            below = [n for n in best if tree.parent[n] == at and tree.token[n] == answer[done]]
            if not below or tree.score[below[0]] < np.log(LEAST):
                break
            at, done = below[0], done + 1
        done, count = done + 1, count + 1
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--nodes", default="16,6,4,2", help="of a request and pass, at most")
    args = parser.parse_args()
    recorded = list(calls(args.bundle))
    tokens = sum(len(answer) for _, answer, _ in recorded)
    print(f"{len(recorded)} calls, {tokens} tokens\n{'nodes':>6}{'lookup':>8}{'calls':>8}{'gain':>7}")
    for nodes in map(int, args.nodes.split(",")):
        copied, both = (tokens / sum(passes(*each, nodes, draws) for each in recorded) for draws in (False, True))
        print(f"{nodes:6}{copied:8.2f}{both:8.2f}{both / copied - 1:+7.0%}")


if __name__ == "__main__":
    main()
