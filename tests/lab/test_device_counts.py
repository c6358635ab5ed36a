"""What an iteration asks of a device, as numbers that a change of design changes in the same commit.

``python tests/lab/test_device_counts.py`` writes device_counts.json anew.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from echo_trt_lab.device_counts import POLICIES, Run

GOLDEN = Path(__file__).with_name("device_counts.json")
ITERATIONS = 8


def counts_of(policy: str, batch: int) -> dict[str, float]:
    return Run(policy, batch, ITERATIONS).counted(ITERATIONS)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("batch", [1, 64])
def test_counts_are_the_golden_ones(policy, batch):
    counts, golden = counts_of(policy, batch), json.loads(GOLDEN.read_text())[f"{policy} {batch}"]
    considered = golden.pop(
        "considered"
    )  # equal scores are told apart otherwise by other versions of PyTorch and NumPy
    assert counts.pop("considered") == pytest.approx(considered, rel=0.15)
    assert counts == golden


@pytest.mark.parametrize("policy", ["static", "dense", "fixed", "echo", "goodput"])
def test_what_is_drafted_at_high_load_is_considered(policy):
    """A draft that gates do not limit, or that computes levels again, drafts several times as much."""
    counts = json.loads(GOLDEN.read_text())[f"{policy} 64"]
    assert 0 < counts["draft_tokens"] <= 1.5 * counts["considered"]


if __name__ == "__main__":
    found = {f"{policy} {batch}": counts_of(policy, batch) for batch in (1, 64) for policy in POLICIES}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(counts)}" for name, counts in found.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
    sys.stdout.write(f"{GOLDEN}\n")
