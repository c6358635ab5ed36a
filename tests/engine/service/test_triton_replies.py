"""The real Triton with faulty parts: a response that cannot be made still lets its request end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from served import Served, needs_triton, triton

import echo_trt
from echo_trt.adapters.triton.server import model_repository

pytestmark = needs_triton
ASKED = {"text_input": "the theme of a thing, ", "max_tokens": 40, "ignore_eos": True}
#: Of Triton's model repository.
MODEL = """
import time

from echo_trt.engine.text.entries import OutgoingLogprobs, OutgoingSources
from echo_trt.adapters.triton import replies
from echo_trt.adapters.triton.model import TritonPythonModel

def fail(*arguments):
    raise RuntimeError("a faulty part")

begin, take = OutgoingLogprobs.begin, OutgoingLogprobs.take

def fail_at_some(self, logprobs, offsets):
    if logprobs:
        fail()
    take(self, logprobs, offsets)

def begin_slowly(*arguments):
    time.sleep(0.5)
    begin(*arguments)

OutgoingSources.clear, OutgoingLogprobs.take = fail, fail_at_some
OutgoingLogprobs.begin, replies.STUCK = begin_slowly, 2.0
"""


@pytest.fixture(scope="module")
def server(roomy_bundle, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("faulty")  # a checkout with another model repository
    (folder / "echo_trt").symlink_to(Path(echo_trt.__file__).parent)
    shutil.copytree(model_repository(), folder / "model_repo")
    (folder / "model_repo" / "echo" / "1" / "model.py").write_text(MODEL)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        server = triton(roomy_bundle, folder / "log")
    try:
        yield server.wait_for("serving")
    finally:
        server.kill()


@pytest.mark.parametrize("kind", ["generate", "generate_stream"])
@pytest.mark.parametrize("detail", ["token_sources", "return_log_probs"], ids=["response", "event"])
def test_a_response_that_cannot_be_made_is_an_error(kind, detail, server):
    body = {**ASKED, detail: True, "stream": kind == "generate_stream"}
    _, answer = server.post(kind, json.dumps(body).encode(), seconds=60)
    (only,) = (json.loads(line.removeprefix("data: ")) for line in answer.decode().split("\n\n") if line.strip())
    assert only == {"error": "the answer could not be sent; the server's log says why."}
    assert server.generate(**ASKED)["completion_tokens"] == ASKED["max_tokens"]
    assert "again" not in server.err
    server.rest()


def test_many_messages_that_take_long_to_make_do_not_end_the_backend(server):
    """Each takes a quarter of the time after which the backend takes Triton for dead."""
    backend = server.children("triton_python_backend_stub")
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: server.generate(**ASKED, prompt_logprobs=0), range(12)))
    for answer in answers:
        assert answer["completion_tokens"] == ASKED["max_tokens"], answer
    assert server.children("triton_python_backend_stub") == backend
