"""NVIDIA's own client: gRPC and HTTP, with the older names of inputs and with those of llmapi."""

import json
import os
import queue
import urllib.request

import numpy as np
import tritonclient.grpc as triton
from tried import MODEL, tried


def tensor(name: str, value: object, kind: str) -> triton.InferInput:
    types = {"BYTES": object, "INT32": np.int32, "FP32": np.float32, "BOOL": bool}
    array = np.array([[value.encode() if isinstance(value, str) else value]], types[kind])
    made = triton.InferInput(name, array.shape, kind)
    made.set_data_from_numpy(array)
    return made


def streamed(inputs: list[triton.InferInput]) -> str:
    found: queue.Queue = queue.Queue()
    with triton.InferenceServerClient(os.environ["GRPC"]) as client:
        client.start_stream(lambda result, error: found.put((result, error)))
        client.async_stream_infer(MODEL, inputs)
        text = ""
        while True:
            result, error = found.get(timeout=60)
            if error:
                raise error
            text += result.as_numpy("text_output")[0, 0].decode()
            if result.as_numpy("finish_reason") is not None:
                return text


def posted(**body: object) -> dict:
    url = f"http://{os.environ['HTTP']}/v2/models/{MODEL}/generate"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode())) as answer:
        return json.load(answer)


def few(answer: dict) -> str:
    if answer["completion_tokens"] > 5:
        raise RuntimeError(f"{answer['completion_tokens']} tokens where 5 were asked for")
    return answer["text_output"]


prompt = tensor("text_input", "The sky is", "BYTES")
tried("gRPC, older names", lambda: streamed([prompt, tensor("max_tokens", 8, "INT32"), tensor("stream", True, "BOOL")]))
tried(
    "gRPC, llmapi's names",
    lambda: streamed([prompt, tensor("sampling_param_max_tokens", 8, "INT32"), tensor("streaming", True, "BOOL")]),
)
tried("HTTP, older names", lambda: few(posted(text_input="The sky is", max_tokens=5)))
tried("HTTP, llmapi's names", lambda: few(posted(text_input="The sky is", sampling_param_max_tokens=5)))
tried(
    "HTTP, structured",
    lambda: posted(text_input="Is it day?", max_tokens=8, structured='{"choice": ["yes", "no"]}')["text_output"],
)
