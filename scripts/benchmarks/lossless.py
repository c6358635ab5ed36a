"""Is every policy's text the text of plain decoding, token for token? On real prompts, at several batch sizes.

    python scripts/benchmarks/lossless.py BUNDLE --prompts FILE ... --batch 1,8,32 --max-tokens 128
    python scripts/benchmarks/lossless.py BUNDLE --prompts FILE ... --policies all --batch 8 --beside OLD_CHECKOUT

The bundle should be in fp32. A difference counts as a tie only if the target's logits of the two tokens, after the text
they share, are within 1e-4; it is listed either way. The budget grows with the batch, so that trees are verified at
every size. --beside compares all texts with those that the package of another checkout writes, bit for bit. Exit code 1
if a difference is no tie, or a text is not the other checkout's.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table

import echo_trt
from echo_trt import LLM, Completion, SamplingParams  # these names alone: other commits have them, too
from echo_trt.speculation.policies import POLICIES, load_policies

PLAIN = "autoregressive"
SHIPPED, ABLATIONS = "static,echo,goodput,goodput-exact", "dense,fixed,goodput-head"
TIE = 1e-4
console = Console()
Texts = dict[str, dict[str, str]]  # policy and batch -> prompt -> SHA-256 of token ids and text


def main(
    bundle: Path,
    prompts: Annotated[list[Path], Parameter(help="JSONL files", consume_multiple=True)],
    batch: Annotated[str, Parameter(help="batch sizes")] = "1,8,32",
    policies: Annotated[str, Parameter(help="compared with plain decoding, by commas, or all")] = SHIPPED,
    max_tokens: int = 128,
    limit: Annotated[int, Parameter(help="prompts of each file; 0 for all")] = 0,
    temperature: float = 0.0,
    top_p: float = 1.0,
    budget: Annotated[int, Parameter(help="K_max a running request, so that trees do not vanish")] = 4,
    prefix_cache: Annotated[bool, Parameter(help="let policies find the prompts that plain decoding computed")] = False,
    out: Annotated[Path | None, Parameter(help="write the rows as JSON")] = None,
    texts_file: Annotated[Path | None, Parameter("--texts", help="write the texts' digests as JSON")] = None,
    same_as: Annotated[Path | None, Parameter(help="compare the texts with those of --texts")] = None,
    beside: Annotated[Path | None, Parameter(help="a checkout of another commit, which is asked first")] = None,
) -> None:
    """Compare and list."""
    if beside:
        raise SystemExit(_beside(beside))
    if "dense" not in POLICIES:  # of earlier commits
        load_policies(Path(__file__).parents[2] / "lab" / "echo_trt_lab" / "ablations.py")
    console.print(f"package {Path(echo_trt.__file__).parent}", soft_wrap=True)
    requested = {f"{file.name}:{i}": text for file in prompts for i, text in enumerate(_read(file)[: limit or None])}
    params = [SamplingParams(max_tokens, temperature, top_p=top_p, seed=i) for i in range(len(requested))]
    rows: list[dict[str, Any]] = []
    texts: Texts = {}
    for size in map(int, batch.split(",")):
        llm = LLM(bundle, PLAIN, size, prefix_cache=prefix_cache)
        ids = [llm.chat_ids(text) for text in requested.values()]
        plain = llm.generate(ids, params)
        texts[f"{PLAIN}, {size} requests"] = _digests(requested, plain)
        for policy in (f"{SHIPPED},{ABLATIONS}" if policies == "all" else policies).split(","):
            llm.set_policy(policy, budget * size)
            answers = llm.generate(ids, params)
            texts[f"{policy}, {size} requests"] = _digests(requested, answers)
            pairs = [(p, a.token_ids, b.token_ids) for p, a, b in zip(ids, plain, answers, strict=True)]
            gaps = [_gap(llm, prompt, first, second) for prompt, first, second in pairs if first != second]
            rows.append({"batch": size, "policy": policy, **_facts(answers, gaps)})
            console.print(rows[-1])
    _show(rows)
    if out:
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if texts_file:
        texts_file.write_text(json.dumps(texts, indent=1) + "\n", encoding="utf-8")
    other = _differing(texts, json.loads(same_as.read_text("utf-8"))) if same_as else 0
    raise SystemExit(1 if other or any(row["ties"] < len(row["gaps"]) for row in rows) else 0)


def _gap(llm: LLM, prompt: list[int], first: list[int], second: list[int]) -> float:
    if hasattr(llm, "gap"):  # of earlier commits
        return llm.gap(prompt, first, second)
    from echo_trt_lab.side_by_side import gap

    return gap(llm, prompt, first, second)


def _read(file: Path) -> list[str]:
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines() if line.strip()]
    return [row["prompt"] if "prompt" in row else row["turns"][0] for row in rows]


def _digests(requested: dict[str, str], answers: list[Completion]) -> dict[str, str]:
    output = (json.dumps([answer.token_ids, answer.text, answer.finish_reason]) for answer in answers)
    return dict(zip(requested, (hashlib.sha256(one.encode()).hexdigest() for one in output), strict=True))


def _facts(answers: list[Completion], gaps: list[float]) -> dict[str, Any]:
    tokens = sum(len(answer.token_ids) for answer in answers)
    verifications = sum(len(answer.token_ids) / answer.accepted_length for answer in answers if answer.token_ids)
    return {
        "identical": len(answers) - len(gaps),
        "requests": len(answers),
        "ties": sum(gap <= TIE for gap in gaps),
        "gaps": gaps,
        "tokens": tokens,
        "accepted_length": round(tokens / verifications, 3),
    }


def _beside(checkout: Path) -> int:
    """Run this command with the package of ``checkout``, then with this one, comparing the texts."""
    words = list(sys.argv[1:])
    index = next(i for i, word in enumerate(words) if word.partition("=")[0] == "--beside")
    del words[index : index + (1 if "=" in words[index] else 2)]
    with tempfile.TemporaryDirectory() as folder:
        texts, command = str(Path(folder) / "texts.json"), [sys.executable, __file__, *words]
        path = os.pathsep.join(str(checkout.resolve() / part) for part in ("", "lab", "plugins"))
        code = subprocess.run([*command, "--texts", texts], env=os.environ | {"PYTHONPATH": path}).returncode
        if not Path(texts).exists():
            return code
        return subprocess.run([*command, "--same-as", texts]).returncode


def _differing(texts: Texts, others: Texts) -> int:
    """Count the texts that are not the other run's, and list them."""
    count = 0
    for name, digests in texts.items():
        differing = [prompt for prompt, digest in digests.items() if others.get(name, {}).get(prompt) != digest]
        console.print(f"{name}: {len(digests) - len(differing)} of {len(digests)} texts are the other run's")
        for prompt in differing:
            console.print(f"  {prompt} is not")
        count += len(differing)
    return count


def _show(rows: list[dict]) -> None:
    table = Table(title="texts identical to plain decoding")
    for column in ("batch", "policy", "identical", "ties", "tokens", "accepted length"):
        table.add_column(column, justify="right")
    for row in rows:
        identical = f"{row['identical']} of {row['requests']}"
        cells = (row["batch"], row["policy"], identical, row["ties"], f"{row['tokens']:,}", row["accepted_length"])
        table.add_row(*map(str, cells))
    console.print(table)


if __name__ == "__main__":
    app = App(default_parameter=Parameter(negative=(), allow_repeating=True))  # also with packages of earlier commits
    app.default(main)
    app()
