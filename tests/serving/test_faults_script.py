"""scripts/proofs/serve_faults.py at a fiftieth of its size; the deaths have tests of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from served import needs_triton

ROOT = Path(__file__).parents[2]
FAULTS = ["departures", "nonsense", "malformed", "queue", "grammars", "compiling", "tools", "mixed"]


@pytest.mark.slow
@needs_triton
def test_nothing_is_lost_where_nothing_may_be(roomy_bundle, tmp_path, monkeypatch, capsys):
    for package in ("starlette", "uvicorn"):
        pytest.importorskip(package, reason="needs the gateway: pip install -e '.[serve]'")
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "scripts" / "proofs")])
    import serve_faults

    failed = serve_faults.run(roomy_bundle, tmp_path, 0.02, FAULTS)
    table = capsys.readouterr().out
    assert not failed, table
    assert len(table.splitlines()) == len(FAULTS) + 2
    assert "0 KV blocks in use, right text" in table
