"""API keys as tenants: what one has sent is not found in the prefix cache by another."""

from __future__ import annotations

import pytest
from server.running import KEY, engine_of, refused, running

OTHER, SHARED, SHARING = "sk-of-somebody-else", "sk-one-who-shares-it", "sk-another-who-shares"
BLOCKS = 3 * 32  # tokens of a prompt that are found again


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(f"{KEY}\n{OTHER} latency=batch\n{SHARED} shared\n{SHARING} latency=batch shared\n")
    return file


@pytest.fixture(scope="module")
def client(long_bundle, keys_file):
    with engine_of(long_bundle, classes="batch") as engine, running(engine, api_keys_file=keys_file) as client:
        yield client


def cached(client, seed: int, headers: str | dict[str, str], **more) -> int:
    """Ask with a prompt of the test's own; return how much of it was found."""
    prompt = [3 + (seed * 31 + i * i) % 60 for i in range(BLOCKS + 5)]
    headers = {"Authorization": f"Bearer {headers}"} if isinstance(headers, str) else headers
    body = {"model": "echo", "prompt": prompt, "max_tokens": 1, **more}
    answer = client.post("/v1/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_a_key_finds_its_own_prompts_alone(client):
    assert [cached(client, 1, key) for key in (KEY, KEY, OTHER, OTHER, SHARED, KEY)] == [0, BLOCKS] * 2 + [0, BLOCKS]


def test_keys_that_share_find_each_other_s(client):
    assert [cached(client, 2, key) for key in (SHARED, SHARING, SHARED, KEY)] == [0, BLOCKS, BLOCKS, 0]


def test_a_salt_divides_what_a_key_finds(client):
    salts = [{"cache_salt": "a"}, {"cache_salt": "a"}, {"cache_salt": "b"}, {}]
    assert [cached(client, 3, KEY, **salt) for salt in salts] == [0, BLOCKS, 0, 0]
    assert [cached(client, 3, SHARED, cache_salt="a"), cached(client, 3, SHARING, cache_salt="a")] == [0, BLOCKS]


def test_the_key_that_lets_a_request_in_is_the_one_that_counts(client):
    assert cached(client, 4, {"x-api-key": KEY}) == 0
    assert cached(client, 4, {"x-api-key": KEY, "Authorization": "Bearer of-a-proxy-before-us"}) == BLOCKS


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses", "/v1/messages"])
def test_chats_of_other_apis_have_keys_and_salts(path, client):
    text = path * 20
    body = {"model": "echo", "messages": [{"role": "user", "content": text}], "max_tokens": 1}
    if path == "/v1/responses":
        body = {"model": "echo", "input": text, "max_output_tokens": 1}

    def found(key: str, salt: str) -> int:
        asked = {**body, "cache_salt": salt}
        usage = client.post(path, json=asked, headers={"Authorization": f"Bearer {key}"}).json()["usage"]
        details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or usage
        return int(details.get("cached_tokens", details.get("cache_read_input_tokens", 0)))

    assert [found(KEY, "a"), found(KEY, "a") > 0, found(OTHER, "a"), found(KEY, "b")] == [0, True, 0, 0]


def test_what_is_no_salt_is_refused(client):
    for salt in ("", 5, "a" * 1001):
        answer = client.post(
            "/v1/completions",
            json={"model": "echo", "prompt": "a", "cache_salt": salt},
            headers={"Authorization": f"Bearer {KEY}"},
        )
        assert "cache_salt" in refused(answer, 400, "cache_salt")
