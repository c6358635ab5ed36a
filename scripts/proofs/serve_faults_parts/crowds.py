"""Too much at once: deadlines that pass, a full queue, a full KV pool."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from pathlib import Path

from echo_trt.bundle.manifest import MANIFEST
from echo_trt.decoding.policies import reserve_for
from echo_trt.runtime.slots import blocks_for
from serve_faults_parts.stage import Row, Stage, attempt, expect, together


def deadlines(stage: Stage) -> Row:
    """Of more requests than can run at once, so that some pass while they wait."""
    number, limit = 2 * stage.batch, 0.5
    tokens = stage.context - 100

    def ask(i: int) -> tuple[dict, float]:
        begin = time.monotonic()
        asked = stage.ask("a", tokens, deadline_ms=int(limit * 1000))
        return attempt(stage.server, asked), time.monotonic() - begin

    answers = together(number, number, ask)
    for answer, seconds in answers:
        expect(answer.get("finish_reason") in ("deadline", "length"), f"an answer with a deadline is {answer}")
        expect(answer["finish_reason"] == "deadline" or seconds < 2 * limit, "a deadline had no effect")
    ended = Counter("without a token" if not a["completion_tokens"] else a["finish_reason"] for a, _ in answers)
    expect(ended["deadline"], f"no deadline passed: {dict(ended)}")
    state = stage.answers_right()
    stage.quiet()
    latest = max(seconds for _, seconds in answers)
    told = ", ".join(f"{count} {'with the text so far' if how == 'deadline' else how}" for how, count in ended.items())
    return Row(
        f"{number} requests with a deadline of {limit} s",
        f"ended by it: {told}; the last answer came after {latest:.2f} s; {state}",
        "the rest of those texts, as asked",
    )


def full_queue(stage: Stage) -> Row:
    """Over HTTP; and through the gateway while it is full."""
    places = stage.batch + stage.queue
    number = places + max(stage.count(128), 64)  # enough to find the places taken, however fast the engine
    crowd = stage.crowd(number)
    body = json.dumps({"model": "echo", "prompt": "a", "max_tokens": 1}).encode()
    late = Counter(stage.gateway(body, "/v1/completions")[0] for _ in range(20))
    whole, errors = crowd.ended()
    refused = sum(count for error, count in errors.items() if "queue is full" in error)
    expect(refused and refused == errors.total(), f"errors other than refusals: {dict(errors)}")
    expect(len(whole) >= places, f"only {len(whole)} of {places} places were used")
    expect(set(late) <= {200, 429}, f"the gateway said {dict(late)}")
    state = stage.answers_right()
    counted = int(stage.server.metrics()['echo_requests_total{outcome="refused"}'])
    expect(counted >= refused, f"{counted} refusals were counted")
    stage.quiet()
    return Row(
        f"{number} requests at once, where {stage.batch} run and {stage.queue} wait",
        f"{refused} refused in a sentence (the gateway: 429 to {late[429]} of 20 meanwhile), "
        f"{len(whole)} answered, {stage.same(whole)}; {state}",
        "the refused, which may try again",
    )


def full_pool(stage: Stage) -> Row:
    """With a KV pool that holds one request of full length, and a fraction of those that run."""
    context = min(stage.context, stage.tokens * stage.batch // 2)  # less than the bundle's at a small scale
    usual, stage.bundle = stage.bundle, _tight(stage.bundle, stage.folder / "tight", context)
    try:
        server = stage.start()
        blocks = int(server.metrics()["echo_blocks"])
        number = 2 * stage.batch
        whole, errors = stage.crowd(number).ended()
        expect(not errors, f"errors: {dict(errors)}")
        preempted = int(stage.resting()["echo_preemptions_total"])
        expect(preempted, "no request was set back: the pool was large enough")
        told = f"all answered, {preempted} preemptions; {stage.same(whole)}; {stage.answers_right()}"
        stage.quiet()
        return Row(f"{number} requests in a pool of {blocks} KV blocks", told, "nothing")
    finally:
        stage.bundle = usual
        stage.start()


def _tight(bundle: Path, folder: Path, context: int) -> Path:
    """The same bundle with the smallest pool that requests of ``context`` tokens may have."""
    shutil.copytree(bundle, folder, copy_function=_linked)
    manifest = json.loads((bundle / MANIFEST).read_text())
    limits = manifest["recipe"]["limits"]
    limits["context"] = context
    limits["kv_blocks"] = int(blocks_for(context + reserve_for(manifest["recipe"]["decoding"])))
    (folder / MANIFEST).unlink()
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def _linked(file: str, copy: str) -> None:
    """Without a second copy where the file system can; a symbolic link would lead out of the bundle."""
    try:
        os.link(file, copy)
    except OSError:
        shutil.copyfile(file, copy)
