"""The fuzz of the public contract: a few seconds of it, and that it draws whatever is declared."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "proofs" / "fuzz.py"


@pytest.mark.slow
def test_random_requests_in_a_crowd_are_answered_as_by_plain_decoding(networks):
    """The first seeds have rounds of every kind but promises, which build bundles."""
    command = [sys.executable, SCRIPT, "--seed", "1", "--minutes", "0.1", "--pairs", "close,lookup"]
    command += ["--networks", networks, "--only", "loop,service,door"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    assert sum(json.loads(run.stdout.partition(": ")[2]).values()) > 0


@pytest.fixture(scope="module")
def declared():
    with pytest.MonkeyPatch.context() as patch:
        for part in ("tests/engine", "tests/engine/service", "tests/speculation", "scripts/proofs"):
            patch.syspath_prepend(str(ROOT / part))
        from fuzz_parts import declared

        yield declared


def test_every_parameter_is_drawn_with_both_ends_of_its_range(declared):
    for name, known in declared.PARAMETERS.items():
        values = [declared.drawn(name, known, random.Random(seed)) for seed in range(600)]
        assert all(known.allows(value) for value in values), name
        if known.single and known.kind in (int, float):
            numbers = [value for value in values if value is not None]
            assert max(numbers) == known.high, name
            first = known.low + known.above if known.kind is int else known.low
            assert min(numbers) == first or (known.above and min(numbers) == 5e-324), name
    targets = [declared.drawn_latency(random.Random(seed)) for seed in range(99)]
    least = min(each["tpot_ms"] for each in targets if "tpot_ms" in each)
    assert declared._is_target("tpot_ms")(least)
    assert not declared._is_target("tpot_ms")(least / 2)


def test_every_field_of_the_door_is_drawn(declared):
    for path, kind in declared.PATHS.items():
        for name in kind.model_fields:
            declared.drawn_field(name, path, random.Random(0))
    bodies = [declared.drawn_body(random.Random(seed)) for seed in range(1000)]
    for path, kind in declared.PATHS.items():
        assert {name for where, body in bodies if where == path for name in body} == kind.known(), path


def test_most_bodies_are_taken(declared):
    from pydantic import ValidationError

    from echo_trt.server.errors import ApiError

    refused = []
    for seed in range(300):
        path, body = declared.drawn_body(random.Random(seed))
        try:
            declared.PATHS[path].model_validate(body)
        except (ApiError, ValidationError) as error:
            refused.append(str(error))
    assert len(refused) < 60, refused[:5]
