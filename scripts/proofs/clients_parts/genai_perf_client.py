"""genai-perf: a streamed chat load, and the same over Triton's gRPC endpoint with TensorRT-LLM's names."""

import os
import subprocess

from tried import MODEL, URL, tried

CHAT = ("--endpoint-type", "chat", "--url", URL)
TRITON = ("--endpoint-type", "kserve", "--backend", "tensorrtllm", "--url", os.environ["GRPC"])


def profile(endpoint: tuple[str, ...]) -> str:
    command = [
        *("genai-perf", "profile", "--model", MODEL, *endpoint, "--streaming", "--tokenizer", os.environ["TOKENIZER"]),
        *("--concurrency", "4", "--request-count", "12", "--warmup-request-count", "2"),
        *("--synthetic-input-tokens-mean", "64", "--output-tokens-mean", "32"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(done.stderr[-300:] or done.stdout[-300:])
    return next((line for line in done.stdout.splitlines() if "Time To First Token" in line), "done")


tried("profile, chat, concurrency 4", lambda: profile(CHAT))
tried("profile, kserve (gRPC), concurrency 4", lambda: profile(TRITON))
