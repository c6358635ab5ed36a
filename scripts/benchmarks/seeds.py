"""Does a seed give one text? Tries the same request in different company, and prints a table in markdown.

    python scripts/benchmarks/seeds.py BUNDLE [BUNDLE ...] --prompts FILE --limit 10

Each prompt is tried four times: twice alone, beside 1 other request and beside 3. It counts in the first share if its
tries agree, and in the second if all of them are the text of plain decoding, one request at a time. Figures hold for
the machine they were taken on: bf16 rounds otherwise on another.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import SamplingParams
from echo_trt.files.prompts import read_prompts

PLAIN = "autoregressive"
COMPANY = (0, 0, 1, 3)


def main(
    bundles: list[Path],
    prompts: Annotated[Path, Parameter(help="JSONL file")] = Path(__file__).parents[1] / "demo_prompts.jsonl",
    limit: Annotated[int, Parameter(help="prompts, spread over the file; 0 for all")] = 10,
    max_tokens: Annotated[int, Parameter(help="of an answer")] = 48,
    temperatures: str = "0,0.8,1",
    policies: str = "goodput,goodput-exact",
    seed: int = 11,
) -> None:
    """One row for each bundle, policy and temperature."""
    texts = [p.text for p in read_prompts(prompts)]
    if limit:
        texts = texts[:: max(len(texts) // limit, 1)][:limit]
    print("| bundle | precision | policy | temperature | one text of four | plain decoding's |")
    print("|---|---|---|---|---|---|")
    for bundle in bundles:
        llm = LLM(bundle, PLAIN, batch=max(COMPANY) + 1, prefix_cache=False)
        requested = [llm.chat_ids(text) for text in texts]
        for temperature in map(float, temperatures.split(",")):
            params = SamplingParams(max_tokens, temperature, seed=seed)
            llm.set_policy(PLAIN)
            plain = [llm.generate([ids], params)[0].token_ids for ids in requested]
            for policy in policies.split(","):
                llm.set_policy(policy)
                tries = [answers(llm, requested, number, params) for number in range(len(requested))]
                same = [all(answer == own[0] for answer in own) for own in tries]
                equal = [all(answer == wanted for answer in own) for own, wanted in zip(tries, plain, strict=True)]
                shares = [f"{kind.count(True)} of {len(texts)}" for kind in (same, equal)]
                row = [bundle.name, llm.manifest.precision, policy, f"{temperature:g}", *shares]
                print(f"| {' | '.join(row)} |", flush=True)


def answers(llm: LLM, prompts: list[list[int]], number: int, params: SamplingParams) -> list[list[int]]:
    """Answer the prompt at ``number`` once in each company: token ids."""
    found, start = [], number + 1
    for others in COMPANY:
        beside = [prompts[(start + i) % len(prompts)] for i in range(others)]
        found.append(llm.generate([prompts[number], *beside], params)[0].token_ids)
        start += others
    return found


if __name__ == "__main__":
    run_alone(main)
