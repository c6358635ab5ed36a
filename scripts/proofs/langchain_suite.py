"""Runs LangChain's standard suite of chat models against a server, by the APIs of OpenAI, Ollama and Anthropic.

    pip install langchain-tests==1.1.9 langchain-openai langchain-ollama langchain-anthropic
    echo-trt serve model.gguf
    python scripts/proofs/langchain_suite.py http://127.0.0.1:9000

Prints a row of counts for each client, then each failure with its error; exit code 1 where there is one. What is not
installed is skipped, with the reason. A small model fails some tests by what it writes. More arguments go to pytest, as
in ``-k tool_calling``.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest

URL = os.environ.get("SUITE_URL", "http://127.0.0.1:9000")
OPENAI = {"base_url": f"{URL}/v1", "api_key": "none", "max_tokens": 200}
#: Package, class and what it is made with.
CLIENTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "OpenAI": ("langchain_openai", "ChatOpenAI", OPENAI),
    "Responses": ("langchain_openai", "ChatOpenAI", OPENAI | {"use_responses_api": True}),
    "Ollama": ("langchain_ollama", "ChatOllama", {"base_url": URL, "num_predict": 200}),
    "Anthropic": ("langchain_anthropic", "ChatAnthropic", OPENAI | {"base_url": URL}),
}
#: One event loop for all tests: clients keep connections from one test to the next.
LOOP = ("asyncio_mode=auto", "asyncio_default_test_loop_scope=session", "asyncio_default_fixture_loop_scope=session")


def suite(standard: type, package: str, client: str, made_with: dict[str, Any]) -> Any:
    """Return the tests of one client as pytest takes them."""
    fields = {
        "chat_model_class": property(lambda _: getattr(import_module(package), client)),
        "chat_model_params": {"model": "echo", "temperature": 0, **made_with},
        "standard_chat_model_params": {},
    }
    missing = pytest.mark.skipif(not find_spec(package), reason=f"needs pip install {package.replace('_', '-')}")
    return missing(type("Suite", (standard,), fields))


class Report:
    """Counts outcomes by client, and keeps the failures."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}
        self.failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        suite, test = report.nodeid.split("::")[1:3]
        client = suite.removeprefix("Test")
        if report.when == "call" or report.outcome != "passed":
            self.counts.setdefault(client, Counter())[report.outcome] += 1
        if report.failed:
            self.failures.append(f"{client} {test}: {' '.join(report.longreprtext.split())[-300:]}")


def main(url: str = URL, *more: str) -> int:
    os.environ["SUITE_URL"], report = url, Report()
    shown = ("-q", "-rs", "--tb=short", "--show-capture=no")
    options = [part for option in LOOP for part in ("-o", option)]
    code = pytest.main([__file__, "-c", os.devnull, *shown, *options, *more], [report])
    print("\n| client | passed | failed | skipped |\n|---|---|---|---|")
    for client, count in report.counts.items():
        print(f"| {client} | {count['passed']} | {count['failed']} | {count['skipped']} |")
    print(*report.failures, sep="\n")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
elif not find_spec("langchain_tests"):
    pytest.skip("needs pip install langchain-tests==1.1.9", allow_module_level=True)
else:
    from langchain_tests.integration_tests import ChatModelIntegrationTests

    globals().update({f"Test{name}": suite(ChatModelIntegrationTests, *client) for name, client in CLIENTS.items()})
