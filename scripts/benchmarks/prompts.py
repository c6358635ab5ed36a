"""Make the benchmark's prompts files from a clone of EAGLE's repository, and check that they hold the published texts.

    git clone https://github.com/SafeAILab/EAGLE
    python scripts/benchmarks/prompts.py EAGLE

Writes prompts/NAME.jsonl, one row per question with ``id`` and ``turns``. Texts other than the published run's end with
exit code 1, and are written nevertheless. Sets that the published run does not have are written as they are.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

#: Set -> SHA-256 of its questions: a JSON list of lists of turns.
PUBLISHED = {
    "mt_bench": "08c588a334985a99c573caa90fa225455eef4da3d885774ed46d8371499bf401",
    "gsm8k": "3910a062c4363f1c90ca8c9d275ce8987be3bc2d395aa861aa9b91ed121710ff",
    "humaneval": "4cc377b882d7b347c1d050946a4f18248c8aed131eb845862eee730eaf83139f",
    "alpaca": "8497f7e1fc969911391fa55379f02cef68dcc978870a15062e0a09beae6fff36",
}
#: News articles to summarise, and questions: not of the published run.
OTHERS = ("sum", "qa")


def fingerprint(questions: list[list[str]]) -> str:
    return hashlib.sha256(json.dumps(questions).encode()).hexdigest()


def main(clone: Path, folder: Path = Path("prompts")) -> int:
    folder.mkdir(exist_ok=True)
    others = []
    for name, expected in (PUBLISHED | dict.fromkeys(OTHERS)).items():
        lines = (clone / "eagle/data" / name / "question.jsonl").read_text().splitlines()
        questions = [json.loads(line)["turns"] for line in lines]
        rows = [json.dumps({"id": f"{name}-{i}", "turns": turns}) for i, turns in enumerate(questions)]
        (folder / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows))
        found = fingerprint(questions)
        differs = expected is not None and found != expected
        others += [name] * differs
        verdict = ", not those of the published run" * differs
        print(f"{folder / name}.jsonl: {len(rows)} questions, {found[:16]}{verdict}")
    return bool(others)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1])))
