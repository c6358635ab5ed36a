"""The table of the siege; the attacks themselves are run by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

SIEGE = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "proofs" / "siege.py"))
Felt, row, line = SIEGE["Felt"], SIEGE["row"], SIEGE["line"]
ALONE = Felt([0.1, 0.2, 0.3], [40.0, 50.0, 60.0])


@pytest.mark.parametrize(
    ("attack", "beside", "server", "missed"),
    [
        ("flood", Felt([0.2, 0.6], [25.0, 30.0]), "up", []),
        ("flood", Felt([0.7], [25.0]), "up", ["first token"]),
        ("flood", Felt([0.2], [24.0], ["503"]), "up", ["lost", "tokens/s"]),
        ("flood", Felt(), "down", ["first token", "tokens/s", "server"]),
        ("flood", ALONE, "restarted", ["server"]),
        ("door-killed", Felt([9.0], [1.0], ["cut"]), "restarted", []),
        ("door-killed", Felt([], [], ["cut", "503"]), "down", ["lost", "server"]),
    ],
)
def test_a_row_names_the_bounds_that_it_misses(attack, beside, server, missed):
    found = row(attack, ALONE, beside, server)
    assert found.missed == missed
    assert str(found).endswith(", ".join(missed))
    assert line(SIEGE["COLUMNS"]).index("server") == str(found).index(f" {server} ") + 1


def test_every_attack_has_a_name_and_kills_are_among_them():
    assert set(SIEGE["KILLS"]) < set(SIEGE["ATTACKS"])
