"""Does a real model's JSON fit its schema under every policy, and is it plain decoding's text, token for token?

    python scripts/proofs/structured.py bundles/smollm2-135m-fp32 --limit 20

Asks for each schema's record, greedily and by a seed, one request at a time and in batches. A text that ended must be
JSON that jsonschema validates, one that was cut must be the beginning of such a text, and both must be plain
decoding's. The bundle should be in fp32. Prints a table in markdown; what failed is named. Exit code 1 if anything did.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from jsonschema import Draft202012Validator, ValidationError
from jsonschema.validators import extend

from echo_trt.engine.llm import LLM
from echo_trt.engine.options import run_alone
from echo_trt.engine.params import Completion, SamplingParams
from echo_trt.grammar.compiler import GrammarCompiler
from echo_trt.grammar.state import State, Vocabulary

PLAIN = "autoregressive"
SCHEMAS = Path(__file__).parents[2] / "tests" / "grammar" / "schemas.json"


@dataclass(frozen=True)
class Case:
    """A schema, and the prompt that asks for a record of it."""

    id: str
    schema: dict[str, Any]
    ids: list[int]
    begin: State


def main(
    bundle: Path,
    schemas: Annotated[Path, Parameter(help="JSON list of id, schema and sentence")] = SCHEMAS,
    limit: Annotated[int, Parameter(help="schemas, spread over the file; 0 for all")] = 0,
    policies: Annotated[str, Parameter(help="compared with plain decoding")] = (
        "autoregressive,goodput,goodput-exact,echo"
    ),
    batch: Annotated[str, Parameter(help="batch sizes")] = "1,8",
    temperatures: Annotated[str, Parameter(help="0 is greedy; others are seeded")] = "0,0.8",
    max_tokens: Annotated[int, Parameter(help="of an answer")] = 64,
    budget: Annotated[int, Parameter(help="K_max a running request, so that trees do not vanish")] = 4,
) -> None:
    """One row for each policy, batch size and temperature."""
    rows = json.loads(schemas.read_text(encoding="utf-8"))
    if limit:
        rows = rows[:: max(len(rows) // limit, 1)][:limit]
    sizes, failures = [int(size) for size in batch.split(",")], 0
    llm = LLM(bundle, PLAIN, max(sizes), prefix_cache=False)
    cases = requested(llm, rows)
    print("| policy | batch | temperature | equal | valid | cut |")
    print("|---|---|---|---|---|---|")
    for temperature in map(float, temperatures.split(",")):
        params = [
            SamplingParams(max_tokens, temperature, seed=number, structured={"json": case.schema})
            for number, case in enumerate(cases)
        ]
        llm.set_policy(PLAIN)
        plain = answers(llm, cases, params, 1)
        for policy in policies.split(","):
            for size in sizes:
                llm.set_policy(policy, None if policy == PLAIN else budget * size)
                given = answers(llm, cases, params, size)
                equal = [mine.token_ids == other.token_ids for mine, other in zip(given, plain, strict=True)]
                wrong = [mistake(case, answer) for case, answer in zip(cases, given, strict=True)]
                cut = sum(answer.finish_reason == "length" for answer in given)
                shares = [f"{equal.count(True)} of {len(cases)}", f"{wrong.count(None)} of {len(cases)}"]
                print(f"| {' | '.join([policy, str(size), f'{temperature:g}', *shares, str(cut)])} |", flush=True)
                for case, same, what in zip(cases, equal, wrong, strict=True):
                    if what or not same:
                        failures += 1
                        print(f"{case.id}: {what or 'another text than plain decoding'}", file=sys.stderr)
    sys.exit(1 if failures else 0)


def requested(llm: LLM, rows: list[dict[str, Any]]) -> list[Case]:
    """Return the prompts, and states that are made apart from the loop's."""
    tokens = Vocabulary(llm.manifest.target.vocab_size, tuple(llm.manifest.eos_token_ids))
    grammars = GrammarCompiler(llm.tokenizer.backend_tokenizer.to_str(), tokens)
    return [
        Case(
            row["id"],
            row["schema"],
            llm.chat_ids(f"Write {row['sentence']} as JSON. Make up what it says. Answer with JSON alone."),
            grammars.begin({"json": row["schema"]}),
        )
        for row in rows
    ]


def answers(llm: LLM, cases: list[Case], params: list[SamplingParams], size: int) -> list[Completion]:
    """Answer all prompts, ``size`` at a time."""
    found: list[Completion] = []
    for start in range(0, len(cases), size):
        part = slice(start, start + size)
        found += llm.generate([case.ids for case in cases[part]], params[part])
    return found


def mistake(case: Case, answer: Completion) -> str | None:
    """Return what is wrong with an answer; None: it fits, as far as it goes."""
    state: State | None = case.begin
    for number, token in enumerate(answer.token_ids):
        state = state.after(token) if state else None
        if state is None:
            return f"token {number} is forbidden: {answer.text!r}"
    if answer.finish_reason == "length":
        return None
    try:
        Validator(case.schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(json.loads(answer.text))
    except (ValueError, ValidationError) as error:
        return f"{answer.text!r} does not fit: {str(error).splitlines()[0]}"
    return None


def _multiple(_validator: object, step: float, instance: object, _schema: object) -> Iterator[ValidationError]:
    """Divide decimals as they are written; floats would make 0.3 no multiple of 0.1."""
    if isinstance(instance, int | float) and not isinstance(instance, bool):
        quotient = Fraction(repr(instance)) / Fraction(repr(step))
        if quotient.denominator != 1:
            yield ValidationError(f"{instance} is no multiple of {step}")


Validator = extend(Draft202012Validator, {"multipleOf": _multiple})

if __name__ == "__main__":
    run_alone(main)
