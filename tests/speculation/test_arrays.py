"""Loops that are compiled: their machine code comes along where numba cannot write beside them."""

from __future__ import annotations

import os
import subprocess
import sys

LOOP = """
from echo_trt.speculation.arrays import compiled

@compiled("i8(i8)")
def doubled(number):
    return 2 * number

print(sum(doubled.stats.cache_hits.values()))
"""


def test_machine_code_beside_a_module_is_used_where_numba_keeps_it_elsewhere(tmp_path):
    (tmp_path / "loop.py").write_text(LOOP)
    hits = [
        subprocess.check_output([sys.executable, "loop.py"], cwd=tmp_path, env=os.environ | more, text=True).strip()
        for more in ({}, {"NUMBA_CACHE_DIR": str(tmp_path / "other")})
    ]
    assert hits == ["0", "1"]
