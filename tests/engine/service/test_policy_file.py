"""A policy of a user's own file in the real server."""

from __future__ import annotations

from pathlib import Path

from engine.service.served import Served

CHAIN = Path(__file__).parents[3] / "examples" / "chain_policy.py"


def test_the_server_answers_under_a_policy_from_a_file(bundle_of, tmp_path):
    options = "--policy-file", CHAIN, "--policy", "chain"
    server = Served(bundle_of("close"), tmp_path / "log", *options).wait_for("serving")
    try:
        plain, drafted = (
            server.complete("the theme", max_tokens=16, speculate=speculate) for speculate in (False, True)
        )
        assert drafted == plain != ""
        metrics = server.wait_metrics(lambda metrics: metrics["echo_drafted_tokens_total"] > 0)
        assert metrics['echo_policy{policy="chain"}'] == 1
    finally:
        assert server.stop() == 0
