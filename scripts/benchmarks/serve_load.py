"""Load on a running server: streams over gRPC, each asking again as soon as its answer has ended.

    echo-trt serve bundles/smollm2-135m &
    python scripts/benchmarks/serve_load.py prompts.jsonl --streams 64 --seconds 60

Prints requests, errors, tokens and messages a second, time to first token and between tokens (median and 99th
percentile of the requests). Needs tritonclient[grpc].
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from echo_trt.files.prompts import read_prompts


@dataclass
class Results:
    first: list[float] = field(default_factory=list)  # seconds to the first token, a request
    between: list[float] = field(default_factory=list)  # seconds a token after it, a request
    tokens: int = 0
    messages: int = 0
    errors: list[str] = field(default_factory=list)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("prompts", type=Path)
    options.add_argument("--url", default="localhost:8001")
    options.add_argument("--streams", type=int, default=64)
    options.add_argument("--seconds", type=float, default=60)
    options.add_argument("--max-tokens", type=int, default=64)
    asked = options.parse_args()
    prompts = [row.text for row in read_prompts(asked.prompts)]
    begin = time.monotonic()
    results = [Results() for _ in range(asked.streams)]
    threads = [
        threading.Thread(target=run, args=(asked, prompts[i:] + prompts[:i], begin + asked.seconds, results[i]))
        for i in range(asked.streams)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    report(results, time.monotonic() - begin)


def run(asked: argparse.Namespace, prompts: list[str], end: float, results: Results) -> None:
    replies: queue.SimpleQueue = queue.SimpleQueue()

    def tell(result, error) -> None:
        replies.put((result, error, time.monotonic()))

    client = triton.InferenceServerClient(asked.url)
    client.start_stream(tell)
    number = 0
    while time.monotonic() < end:
        begin, times, tokens = time.monotonic(), [], 0
        inputs = inputs_of(prompts[number % len(prompts)], asked.max_tokens)
        try:
            client.async_stream_infer("echo", inputs, enable_empty_final_response=True)
        except InferenceServerException as error:  # an earlier error has closed the stream
            results.errors.append(str(error))
            return
        number += 1
        while True:
            try:
                result, error, at = replies.get(timeout=120)
            except queue.Empty:
                results.errors.append("no answer for 120 s")
                return
            if error is not None:
                results.errors.append(str(error))
                break
            times.append(at)
            tokens += result.as_numpy("output_ids").size
            if result.get_response().parameters["triton_final_response"].bool_param:
                results.first.append(times[0] - begin)
                results.between.append((times[-1] - times[0]) / max(tokens - 1, 1))
                break
        results.tokens += tokens
        results.messages += len(times)
    client.stop_stream()
    client.close()


def inputs_of(prompt: str, max_tokens: int) -> list[triton.InferInput]:
    values = (
        ("text_input", "BYTES", np.array([[prompt.encode()]], object)),
        ("chat", "BOOL", np.array([[True]])),
        ("stream", "BOOL", np.array([[True]])),
        ("max_tokens", "INT32", np.array([[max_tokens]], np.int32)),
    )
    tensors = []
    for name, kind, array in values:
        tensors.append(triton.InferInput(name, array.shape, kind))
        tensors[-1].set_data_from_numpy(array)
    return tensors


def report(results: list[Results], seconds: float) -> None:
    first = np.concatenate([r.first for r in results]) * 1e3
    between = np.concatenate([r.between for r in results]) * 1e3
    errors = [error for r in results for error in r.errors]
    print(
        f"{len(results)} streams, {seconds:.1f} s: {len(first)} answers, {len(errors)} errors {sorted(set(errors))[:3]}"
    )
    print(f"{sum(r.tokens for r in results) / seconds:.1f} tokens/s, ", end="")
    print(f"{sum(r.messages for r in results) / seconds:.1f} messages/s")
    if len(first):
        for name, values in (("time to first token", first), ("between tokens", between)):
            print(f"{name}: {np.median(values):.1f} ms median, {np.percentile(values, 99):.1f} ms p99")


if __name__ == "__main__":
    main()
