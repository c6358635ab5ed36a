"""Workers behind the real Dynamo: the texts of the offline interface, whichever worker answers and whichever dies.

One frontend and two workers serve all tests here, which leave them whole; the last test ends them.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cluster import SECONDS, Cluster, Reply
from driving import prompt_ids

from echo_trt.engine.llm import LLM
from echo_trt.engine.params import Completion, SamplingParams

pytestmark = [pytest.mark.needs_dynamo, pytest.mark.slow]
DOCS = Path(__file__).parents[3] / "docs" / "dynamo.md"
LENGTH = 120
PART = "\ufffd"  # of a character: Dynamo's frontend writes fewer of them for bytes that are none
GREEDY = {"temperature": 0, "max_tokens": LENGTH, "ignore_eos": True}
#: Requests as a client writes them; SamplingParams spells them alike.
ASKED: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 0.8, "seed": 7},
    "nucleus": {"temperature": 1.1, "seed": 8, "top_p": 0.7, "top_k": 40},
    "min_p": {"temperature": 1.3, "seed": 9, "min_p": 0.05},
    "penalties": {"frequency_penalty": 0.7, "presence_penalty": 0.4},
    "repetition": {"repetition_penalty": 1.3, "temperature": 0.6, "seed": 3},
    "stop": {"temperature": 1.0, "seed": 5, "stop": ["na"], "ignore_eos": False},  # Dynamo drops it with ignore_eos
    "stop tokens": {"temperature": 1.0, "seed": 5, "stop_token_ids": [76, 281], "min_tokens": 30, "ignore_eos": False},
    "logprobs": {"temperature": 0.7, "seed": 11, "logprobs": 2},
}


def prompt_of(name: str) -> list[int]:
    return prompt_ids(40, sorted(ASKED).index(name))


@functools.cache
def whole(offline: LLM, name: str, length: int = LENGTH) -> Completion:
    given = GREEDY | ASKED[name] | {"max_tokens": length}
    return offline.generate([prompt_of(name)], SamplingParams(**given))[0]


def ask_all(cluster: Cluster) -> dict[str, Reply]:
    """All at once."""
    with ThreadPoolExecutor(len(ASKED)) as pool:
        replies = pool.map(lambda name: cluster.ask(prompt_of(name), **GREEDY | ASKED[name]), ASKED)
        return dict(zip(ASKED, replies, strict=True))


def assert_same(reply: Reply, text: Completion) -> None:
    assert not reply.error
    assert (reply.token_ids, reply.reason) == (text.token_ids, text.finish_reason)
    assert reply.text.replace(PART, "") == text.text.replace(PART, "")
    assert reply.usage["prompt_tokens"] == text.prompt_tokens
    assert reply.usage["completion_tokens"] == len(text.token_ids)
    if text.logprobs:
        reported = [logprob for _, logprob in reply.logprobs]
        assert reported == pytest.approx([entry.logprob for entry in text.logprobs], abs=1e-3)


def test_texts_are_those_of_the_offline_interface_whichever_worker_answers(cluster, offline):
    replies = ask_all(cluster)
    for name, reply in replies.items():
        assert_same(reply, whole(offline, name))
    assert len({reply.worker for reply in replies.values()}) == 2
    assert replies["stop"].reason == replies["stop tokens"].reason == "stop"


def blocks(language: str) -> list[str]:
    """Return the documentation's blocks for clients."""
    return re.findall(rf"^```{language}\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)


def test_openai_s_client_streams(cluster, offline):
    openai = pytest.importorskip("openai")
    client, messages = openai.OpenAI(base_url=cluster.url(), api_key="none"), [{"role": "user", "content": "Why?"}]
    [model] = client.models.list().data
    given = {"model": model.id, "messages": messages, "max_tokens": 64, "temperature": 0}
    parts = client.chat.completions.create(**given, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    [completion] = offline.chat(messages, SamplingParams(64))
    assert completion.text
    assert text.replace(PART, "") == completion.text.replace(PART, "")


def test_the_documentation_starts_what_is_tested_here(cluster):
    [line] = re.findall(r"^\$ (echo-trt serve .*)", "".join(blocks("")), re.MULTILINE)
    assert line.split()[3:] == ["--replicas", "2"]
    assert {"--replicas", "2"} <= set(cluster.process.args)
    script = (DOCS.parents[1] / "scripts" / "replicas").read_text()
    assert line.replace("bundles/smollm2-135m", '"$bundle"') in script


@pytest.mark.parametrize(
    ("kind", "grammar"),
    [
        ("choice", ["the theme", "a thing"]),
        ("regex", "[a-e]{8}"),
        ("grammar", 'start: "a" "b"~3'),
        ("json", {"enum": [1, 2, True]}),
    ],
)
def test_answers_fit_grammars(cluster, offline, kind, grammar):
    reply = cluster.ask(prompt_ids(20, 1), temperature=0, max_tokens=LENGTH, **{f"guided_{kind}": grammar})
    assert_same(reply, offline.generate([prompt_ids(20, 1)], SamplingParams(LENGTH, structured={kind: grammar}))[0])


def test_an_object_waits_for_no_slow_grammar(cluster):
    """Of ten grammars, which take a second each and are spread over two workers, few are compiled by then."""
    schemas = [{"type": "array", "items": {"type": "number", "multipleOf": 99989 - 2 * i}} for i in range(10)]
    any_object = {"guided_json": {"type": "object"}, "max_tokens": 2}
    assert {cluster.ask(prompt_ids(20, i), **any_object).status for i in range(4)} == {200}  # reads the tokenizers
    with ThreadPoolExecutor(len(schemas)) as pool:
        slow = [pool.submit(cluster.ask, prompt_ids(20, 1), max_tokens=2, guided_json=schema) for schema in schemas]
        cluster.wait(lambda: sum(worker.metrics()["echo_queued"] for worker in cluster.workers) >= 6, 30)
        assert cluster.ask(prompt_ids(20, 1), **any_object).status == 200
        assert sum(reply.done() for reply in slow) < 6
        assert {reply.result().status for reply in slow} == {200}


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ({"n": 2, "nvext": {"extra_fields": []}}, "n is 2, but Dynamo reads one choice"),
        ({"nvext": {"cache_salt": "mine"}}, "cache_salt is not supported"),
        ({"guided_regex": "["}, "structured.regex"),
        ({"max_tokens": 20, "min_tokens": 30}, "min_tokens is 30"),
    ],
)
def test_what_the_engine_cannot_do_is_refused_by_a_sentence(cluster, requested, words):
    reply = cluster.ask(prompt_ids(20, 1), **requested)
    assert reply.status == 400
    assert words in reply.error


def test_images_and_adapters_are_refused_by_name(cluster):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGVsbG8="}}
    reply = cluster.chat([{"role": "user", "content": [{"type": "text", "text": "a"}, image]}])
    assert (reply.status, "no images" in reply.error) == (400, True)
    reply = cluster.ask(prompt_ids(20, 1), model="echo-adapter")
    assert (reply.status, "not found" in reply.error) == (404, True)


def test_a_deadline_ends_an_answer_as_it_is(cluster):
    header = {"x-dynamo-meta-deadline-ms": "1"}
    reply = cluster.ask(prompt_ids(20, 1), header, **GREEDY | {"max_tokens": 400})
    assert (reply.status, reply.reason, reply.error) == (200, "length", "")
    assert reply.usage["completion_tokens"] < 400
    assert cluster.ask(prompt_ids(20, 1), {"x-dynamo-meta-deadline-ms": "soon"}).status == 400


def test_a_client_that_leaves_frees_its_blocks(cluster):
    for reply in cluster.stream(prompt_ids(60, 5), **GREEDY | {"max_tokens": 400}):
        if reply.text:
            break
    worker = cluster.worker_of(reply.worker)
    cluster.wait(lambda: worker.metrics()["echo_blocks_used"] == 0, 20)
    assert worker.metrics()["echo_emitted_tokens_total"] > 0


def test_a_prompt_goes_to_the_worker_that_has_its_beginning(cluster):
    documents = [prompt_ids(200, 100 + number) for number in range(8)]
    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(lambda d: cluster.ask(d, temperature=0, max_tokens=4), documents))
    homes = [reply.worker for reply in first]
    assert len(set(homes)) == 2
    time.sleep(1)  # events are on their way
    for number in (5, 0, 7, 2, 4, 1, 6, 3):
        reply = cluster.ask([*documents[number], *prompt_ids(20, 200 + number)], temperature=0, max_tokens=4)
        assert reply.worker == homes[number]
        assert reply.usage["prompt_tokens_details"]["cached_tokens"] >= 192


def test_metrics_and_health(cluster):
    for worker in cluster.workers:
        assert worker.healthy()
        cluster.wait(lambda worker=worker: worker.metrics()["dynamo_component_kv_cache_hit_rate"] > 0, 10)
        cluster.wait(lambda worker=worker: worker.metrics()["dynamo_component_gpu_cache_usage_percent"] == 0, 10)
        for name in ("echo_queued", "echo_running"):  # one of Dynamo's own probes may be under way
            cluster.wait(lambda worker=worker, name=name: worker.metrics()[name] == 0, 10)
        metrics = worker.metrics()
        assert metrics["echo_emitted_tokens_total"] > 0
        assert metrics["echo_blocks"] == metrics["dynamo_component_total_blocks"] > 0
        assert "echo_speculation_gain" in metrics


def test_full_queues_are_told_and_nobody_who_was_taken_is_lost(cluster, offline):
    """Two workers, each with four places, a queue of four and one more in Dynamo's own: 18 of 40 at least."""
    with ThreadPoolExecutor(40) as pool:
        replies = list(pool.map(lambda i: cluster.ask(prompt_ids(30, i), **GREEDY | {"max_tokens": 150}), range(40)))
    taken = [i for i, reply in enumerate(replies) if reply.status == 200]
    assert {reply.status for reply in replies} == {200, 529}
    assert len(taken) >= 16
    for i in taken[:4]:
        assert_same(replies[i], offline.generate([prompt_ids(30, i)], SamplingParams(150, ignore_eos=True))[0])
    assert_same(cluster.ask(prompt_of("greedy"), **GREEDY), whole(offline, "greedy"))


def test_entries_that_are_lost_are_written_anew(cluster):
    before = {entry.name for kind in ("mdc", "instances", "event_channels") for entry in cluster.entries(kind)}
    assert len(before) > 6
    ours = {entry.name for entry in cluster.entries("mdc")}
    for entry in cluster.entries("mdc"):
        entry.unlink()
    cluster.wait(lambda: {entry.name for entry in cluster.entries("mdc")} == ours, 30)
    cluster.wait_for_workers(2)
    time.sleep(12)  # longer than a lease: Dynamo touches them again
    assert {entry.name for entry in cluster.entries("mdc")} == ours
    assert not cluster.ask(prompt_of("greedy"), **GREEDY).error


def test_a_frontend_that_dies_is_started_again_and_knows_where_beginnings_are(cluster):
    document = prompt_ids(200, 300)
    home = cluster.ask(document, temperature=0, max_tokens=4).worker
    os.kill(cluster.frontend, signal.SIGKILL)
    cluster.wait(lambda: "Dynamo's frontend has died (" in cluster.log)
    cluster.wait_for_workers(2)
    reply = cluster.ask([*document, *prompt_ids(9, 301)], temperature=0, max_tokens=4)
    assert reply.worker == home
    assert reply.usage["prompt_tokens_details"]["cached_tokens"] >= 192


LONG = 1400  # tokens of an answer that takes seconds on any machine


def all_moved(cluster: Cluster, offline: LLM, number: int, victim: int = 0) -> int:
    """Send a signal to a worker in the middle of answers, all of which must end as if nothing had happened.

    The worker is the process ``victim``, or the one that gives most of the answers: Dynamo's router sends prompts to
    where their beginnings are, which can be one worker for all of them. Returns its process.
    """
    moving = [name for name in ASKED if name not in ("stop", "stop tokens")]
    replies: dict[str, Reply] = {}
    begun = threading.Barrier(len(moving) + 1, timeout=60)

    def ask(name: str) -> None:
        waited = False
        for reply in cluster.stream(prompt_of(name), **GREEDY | ASKED[name] | {"max_tokens": LONG}):
            replies[name] = reply
            if reply.text and not waited:
                waited = True
                begun.wait()

    moves = cluster.log.count("migration retry scheduled")
    threads = [threading.Thread(target=ask, args=(name,), daemon=True) for name in moving]
    for thread in threads:
        thread.start()
    begun.wait()
    [(busiest, _)] = Counter(reply.worker for reply in replies.values()).most_common(1)
    victim = victim or cluster.worker_of(busiest).pid
    os.kill(victim, number)
    for name, thread in zip(moving, threads, strict=True):
        thread.join(SECONDS)
        assert not thread.is_alive(), f"the answer of {name} does not end: {cluster.log[-4000:]}"
    for name in moving:
        assert_same(replies[name], whole(offline, name, LONG))
    assert cluster.log.count("migration retry scheduled") > moves
    return victim


def test_answers_of_a_killed_worker_go_on_at_another_one_and_it_is_started_again(cluster, offline):
    victim = all_moved(cluster, offline, signal.SIGKILL)
    cluster.wait(lambda: re.search(r"worker \d has died .*; starting it again", cluster.log) is not None)
    cluster.wait_for_workers(2)
    assert victim not in [worker.pid for worker in cluster.workers]


def test_answers_of_a_worker_that_hangs_go_on_at_another_one_and_it_is_replaced(cluster, offline):
    victim = all_moved(cluster, offline, signal.SIGSTOP)
    cluster.wait(lambda: victim not in [worker.pid for worker in cluster.workers], 120)
    cluster.wait_for_workers(2)


def test_a_worker_that_joins_takes_requests_and_hands_them_on_when_it_is_told_to_stop(cluster, offline):
    """It has a second for its answers, which is less than they take."""
    joined = cluster.join("--queue", 4, "--drain-timeout", 1)
    cluster.wait_for_workers(3)
    replies = ask_all(cluster)
    assert len({reply.worker for reply in replies.values()}) == 3
    all_moved(cluster, offline, signal.SIGTERM, joined.pid)
    assert joined.wait(60) == 0
    cluster.wait_for_workers(2)


def test_a_launcher_that_is_told_to_stop_finishes_what_is_open(cluster, offline):
    begun = threading.Barrier(7, timeout=60)

    def answered(i: int) -> Reply:
        streamed = cluster.stream(prompt_ids(30, i), **GREEDY | {"max_tokens": 300})
        first = next(streamed)
        begun.wait()
        return [first, *streamed][-1]

    with ThreadPoolExecutor(6) as pool:
        requested = [pool.submit(answered, i) for i in range(6)]
        begun.wait()
        cluster.process.send_signal(signal.SIGTERM)
        replies = [future.result() for future in requested]
    assert cluster.process.wait(60) == 0
    for i, reply in enumerate(replies):
        assert_same(reply, offline.generate([prompt_ids(30, i)], SamplingParams(300, ignore_eos=True))[0])
    assert not re.search("Traceback|panicked", cluster.log)
