"""What every program here begins with: a feature is tried, and its outcome printed between tabs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

URL, MODEL = os.environ["URL"], os.environ["MODEL"]
BASE = f"{URL}/v1"
QUESTION = "Give me a JSON record of the city of Paris: name, country, population."
#: Words of a refusal that tells what to do.
REFUSALS = ("not supported", "leave it out", "chat template", "give ", "run a server")


def tried(feature: str, task: Callable[[], Any]) -> None:
    """Print how ``task`` ended; it returns what it got, and raises or returns nothing where it did not work."""
    try:
        output = str(task())
        outcome = "broken" if output in ("", "None", "[]") else "works"
    except Exception as error:
        output = str(error)
        outcome = (
            "refused"
            if ("400" in output or "404" in output) and any(words in output for words in REFUSALS)
            else "broken"
        )
    print(feature, outcome, " ".join(output.split())[:160], sep="\t", flush=True)
