"""Tokens per pass of tool calls: by prompt lookup, and with what declared tools tell of a call beside it.

    python scripts/benchmarks/tool_calls.py BUNDLE [--nodes 16,6,4,2]
    python scripts/benchmarks/tool_calls.py BUNDLE --streams 1,4

Replays the calls of ``tool_calls.jsonl``, five agents' loops of six calls in Hermes' form, with the bundle's tokenizer
and chat template, and no network: what is accepted of a draft is what the recorded call says. The best nodes of a
request are verified, at most as many as --nodes; under load a request gets few. With --streams the bundle's own model
answers the same chats under goodput, so many at once, which takes a model that can call tools.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.lookup import LookupDrafter
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.engine.request import Request
from echo_trt.engine.sources.calls import CallSource, skeleton
from echo_trt.models.chat import ChatEncoder
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.server.tool_formats.marked import HERMES, Marked
from echo_trt.speculation.goodput.optimiser.merge import merge
from echo_trt.speculation.super_tree import SuperTree

Recorded = tuple[list[int], list[int], np.ndarray]
LOOPS = Path(__file__).with_suffix(".jsonl")
MATCH, ACCEPTANCE = 2, (0.2, 0.4, 0.6, 0.75)  # of prompt lookup, as in recipes
LENGTH = 8  # of a copy
LEAST = 0.1  # P(accept) of a node that is verified
SYSTEM = "You are a helpful assistant. Call the tools to do what the user wants."


def calls(bundle: Path) -> Iterator[Recorded]:
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
    batch.tokens[0, : len(text)], batch.prompt_length[0], batch.known["calls"][0] = text, len(prompt), known
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


def written(llm: LLM, recorded: Sequence[Recorded], draws: bool) -> tuple[list[list[int]], float, float]:
    """Return what the model answers to the prompts, its tokens per verification, and tokens per second."""
    params, before, begin = SamplingParams(128, temperature=0), llm.counters.copy(), time.perf_counter()
    no_call = skeleton([])
    requests = [
        Request(i, np.array(ids), params, calls=known if draws else no_call)
        for i, (ids, _, known) in enumerate(recorded)
    ]
    for request in requests:
        llm.prepare(request)
        llm.loop.scheduler.add(request)
    while llm.loop.scheduler.busy:
        llm.loop.step()
    tokens = llm.counters.emitted_tokens - before.emitted_tokens
    per_pass = tokens / (llm.counters.verifications - before.verifications)
    return [request.generated for request in requests], per_pass, tokens / (time.perf_counter() - begin)


def by_the_model(bundle: Path, streams: Sequence[int]) -> None:
    recorded = list(calls(bundle))
    print(f"{'streams':>7}{'lookup':>8}{'calls':>8}{'tokens/s':>10}  calls of {len(recorded)}, texts")
    for count in streams:
        llm = LLM(bundle, "goodput", count)
        written(llm, recorded[:count], False)  # warm
        sides = [written(llm, recorded, draws) for draws in (False, True)]
        (plain, copied, rate), (texts, both, faster) = sides
        called = sum(llm.tokenizer.decode(text).lstrip().startswith("<tool_call>") for text in texts)
        same = "equal" if plain == texts else "DIFFER"
        print(f"{count:7}{copied:8.2f}{both:8.2f}{faster / rate:10.2f}  {called}, {same}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--nodes", default="16,6,4,2", help="of a request and pass, at most")
    parser.add_argument("--streams", default="", help="let the bundle's model answer, so many requests at once")
    args = parser.parse_args()
    if args.streams:
        return by_the_model(args.bundle, [int(count) for count in args.streams.split(",")])
    recorded = list(calls(args.bundle))
    tokens = sum(len(answer) for _, answer, _ in recorded)
    print(f"{len(recorded)} calls, {tokens} tokens\n{'nodes':>6}{'lookup':>8}{'calls':>8}{'gain':>7}")
    for nodes in map(int, args.nodes.split(",")):
        copied, both = (tokens / sum(passes(*each, nodes, draws) for each in recorded) for draws in (False, True))
        print(f"{nodes:6}{copied:8.2f}{both:8.2f}{both / copied - 1:+7.0%}")


if __name__ == "__main__":
    main()
