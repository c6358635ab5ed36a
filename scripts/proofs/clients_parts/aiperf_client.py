"""AIPerf: a streamed chat load, and its report on speculation."""

import os
import subprocess

from tried import MODEL, URL, tried


def profile() -> str:
    command = [
        *("aiperf", "profile", "--model", MODEL, "--url", URL, "--endpoint-type", "chat", "--streaming"),
        *("--tokenizer", os.environ["TOKENIZER"], "--concurrency", "4", "--request-count", "12"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "32", "--ui", "none"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:] or done.stdout[-300:])
    if "Acceptance Length" not in done.stdout:
        raise RuntimeError("AIPerf prints no report on speculation")
    return next((line for line in done.stdout.splitlines() if "Time to First Token" in line), "done")


tried("profile, chat, concurrency 4", profile)
