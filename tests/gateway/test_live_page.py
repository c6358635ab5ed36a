"""The live page in a real Chromium, before the real server."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from pairs import LIMITS, recipe_of
from serving.served import Served, needs_triton

from echo_trt.commands.build import build

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or ""
pytestmark = [
    needs_triton,
    pytest.mark.skipif(not CHROMIUM, reason="needs a Chromium: apt-get install chromium, or its path in CHROMIUM"),
]
KEY = "sk-0123456789abcdef"
PROMPT = "the theme of a thing"
SECONDS = 60_000  # milliseconds, for what takes a moment on a quiet machine
#: A schema that makes any model write for a while.
LONG = {"type": "array", "items": {"type": "integer"}, "minItems": 400}
LIVE = '#state[data-state="live"]'


@pytest.fixture(scope="module")
def server(networks, tmp_path_factory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("page")
    bundle = folder / "close"
    build(recipe_of("close", networks, limits={**LIMITS, "batch": 8, "context": 1600}), networks, bundle)
    (folder / "keys").write_text(KEY)
    served = Served(bundle, folder / "log", "--api-keys-file", folder / "keys", gateway=True)
    try:
        yield served.wait_for("serving")
        assert KEY not in served.err
    finally:
        served.kill()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server) -> Iterator[Callable[..., Any]]:
    """A page in a context of its own. What it asks stays at its origin, and it breaks no rule of its own."""
    contexts, asked, complaints = [], [], []

    def get(key: str = KEY, wait: str = LIVE, **options: Any) -> Any:
        options = {"viewport": {"width": 1280, "height": 800}, **options}
        context = browser.new_context(**options)
        context.set_default_timeout(SECONDS)
        contexts.append(context)
        if key:
            context.add_init_script(
                f"sessionStorage.getItem('echo-trt.key') ?? sessionStorage.setItem('echo-trt.key', '{key}')"
            )
        page = context.new_page()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "Policy" in message.text else None)
        page.goto(origin(server))
        page.wait_for_selector(wait)
        return page

    yield get
    for context in contexts:
        context.close()
    assert {url for url in asked if not url.startswith(origin(server))} == set()
    assert complaints == []


def origin(server: Served) -> str:
    return f"http://127.0.0.1:{server.openai}/"


def until(page: Any, true: str) -> None:
    """Wait for an expression to be true. Playwright's own way is an eval in the page, which its policy forbids."""
    end = time.monotonic() + SECONDS / 1000
    while not page.evaluate(true):
        assert time.monotonic() < end, true
        page.wait_for_timeout(50)


def ask(page: Any, text: str = PROMPT, **settings: str) -> None:
    """Send a message; ``settings`` by the ids of their fields."""
    for name, value in settings.items():
        page.evaluate("([id, value]) => { document.getElementById(id).value = value }", [name, value])
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ended(page: Any, answers: int = 1) -> None:
    until(page, f"document.querySelectorAll('.answer[data-ended]').length === {answers}")
    until(page, "document.querySelector('#stop').disabled")


def answer_of(server: Served, **body: Any) -> dict[str, Any]:
    body = {"model": "echo", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, **body}
    headers = {"authorization": f"Bearer {KEY}"}
    reply = httpx.post(f"{origin(server)}v1/chat/completions", json=body, headers=headers, timeout=120)
    return reply.raise_for_status().json()["choices"][0]


# -- chat ------------------------------------------------------------------------------------------------------------


def test_a_chat_tells_who_proposed_each_token(open_page, server):
    page = open_page()
    ask(page, limit="40")
    ended(page)
    expected = answer_of(server, max_tokens=40, token_sources=True)
    assert page.inner_text(".said") == PROMPT
    assert page.text_content(".answer .text") == expected["message"]["content"]
    sources = [entry["source"] for entry in expected["token_sources"]]
    assert page.locator(".answer .t.s-head").count() > 3
    assert page.locator(".answer .t").count() <= len(sources)  # white space has no mark
    figures = page.inner_text(".figures")
    for word in ("first token", "tokens/s", "accepted length"):
        assert word in figures
    assert "Tokens by source: target itself" in page.get_attribute(".shares", "aria-label")
    assert page.inner_text("#told").startswith("Answer complete")
    page.hover(".answer .t.s-head >> nth=0")
    assert page.inner_text("#tip").startswith("draft, expected with ")
    marked = "getComputedStyle(document.querySelector('.t.s-head')).borderBottomColor"
    assert "rgba(0, 0, 0, 0)" not in page.evaluate(marked)
    page.uncheck("#colours")
    assert page.evaluate(marked) == "rgba(0, 0, 0, 0)"
    ask(page, "and", limit="5")  # the conversation goes on
    ended(page, 2)
    page.click("#clear")
    assert page.locator(".answer").count() == 0


def test_an_answer_can_be_stopped(open_page, server):
    page = open_page()
    for end, number in ((lambda: page.click("#stop"), 1), (lambda: page.keyboard.press("Escape"), 2)):
        ask(page, schema=json.dumps(LONG), limit="1400")
        until(page, f"document.querySelectorAll('.answer .t').length > {2 * number}")
        end()
        ended(page, number)
        assert page.inner_text(".answer >> nth=-1 >> .error") == "Stopped."
    server.wait_metrics(lambda metrics: metrics["echo_running"] == 0)


def test_settings_reach_the_model_and_mistakes_are_told(open_page, server):
    page = open_page()
    chosen = {"system": "a thing", "temperature": "0.8", "seed": "7", "limit": "30"}
    ask(page, **chosen)
    ended(page)
    messages = [{"role": "system", "content": "a thing"}, {"role": "user", "content": PROMPT}]
    expected = answer_of(server, messages=messages, temperature=0.8, seed=7, max_tokens=30)
    assert page.text_content(".answer .text") == expected["message"]["content"]
    assert page.is_hidden("#tools-field")  # the model's template knows none
    ask(page, schema="{")
    page.wait_for_selector("#log > .error")
    assert "The JSON schema in the settings is no JSON" in page.inner_text("#log > .error")
    ask(page, schema=json.dumps({"type": 5}))
    ended(page, 2)
    assert "json_schema" in page.inner_text(".answer >> nth=-1 >> .error")
    ask(page, schema=json.dumps({"enum": ["yes", "no"]}), system="", limit="20")
    ended(page, 3)
    assert json.loads(page.text_content(".answer >> nth=-1 >> .text")) in ("yes", "no")


def test_plain_decoding_stands_beside_the_drafts(open_page):
    page = open_page()
    page.check("#beside")
    ask(page, limit="60")
    ended(page, 2)
    plain, drafted = page.locator(".answer .text").all()
    assert plain.text_content() == drafted.text_content()
    assert plain.locator(".t:not(.s-target)").count() == 0 < drafted.locator(".t.s-head").count()
    assert "The same text, token for token" in page.inner_text(".verdict")
    assert "times as fast as plain decoding" in page.inner_text(".verdict")


# -- the batch -------------------------------------------------------------------------------------------------------


def test_the_tree_moves_with_the_batch(open_page, server):
    page = open_page()
    with ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(answer_of, server, max_tokens=1400, ignore_eos=True) for _ in range(3)]
        times = {page.evaluate("tree.dataset.time")}
        while not all(answer.done() for answer in answers):
            times.add(page.evaluate("tree.dataset.time"))
            time.sleep(0.05)
    assert len(times - {None}) > 2
    until(page, "Number(tree.dataset.nodes) > Number(tree.dataset.requests)")
    assert "drafted nodes accepted" in page.get_attribute("#tree", "aria-label")
    assert "tokens verified" in page.get_attribute("#budget", "aria-label")
    assert "target" in page.get_attribute("#time", "aria-label")
    assert "of 8" in page.inner_text("#tile-running")
    drawn = "[...tree.getContext('2d').getImageData(0, 0, tree.width, tree.height).data].some((each) => each)"
    assert page.evaluate(drawn)
    page.click("#pause")
    page.wait_for_timeout(300)
    held = page.evaluate("tree.dataset.time")
    answer_of(server, max_tokens=100)
    page.wait_for_timeout(700)
    assert page.evaluate("tree.dataset.time") == held
    assert page.inner_text("#pause") == "Go on"


def test_load_is_off_until_it_is_started_and_ends_where_it_is_stopped(open_page, server):
    page, sent = open_page(), []
    page.on(
        "request", lambda request: sent.append(json.loads(request.post_data)) if "completions" in request.url else 0
    )
    page.wait_for_timeout(500)
    assert sent == []
    page.evaluate("load.value = 6; load.dispatchEvent(new Event('input'))")
    assert page.inner_text("#load-count") == "6 requests"
    page.click("#load-switch")
    until(page, "Number(document.querySelector('#tile-running .value').textContent) >= 4")
    assert sum(len(body["prompt"]) for body in sent[:2]) == 6
    page.evaluate("load.value = 64; load.dispatchEvent(new Event('change'))")
    until(page, "Number(document.querySelector('#tile-running .value').textContent) === 8")
    assert max(len(body["prompt"]) for body in sent) == 32
    page.click("#load-switch")
    assert page.inner_text("#load-note") == "Off."
    server.wait_metrics(lambda metrics: metrics["echo_running"] == metrics["echo_queued"] == 0)


# -- ways to look at it ----------------------------------------------------------------------------------------------


def test_a_phone_shows_all_of_it(open_page):
    page = open_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    ask(page, limit="30")
    ended(page)
    for name in ("#send", "#tiles", "#tree", "#strip", "#time", "#load", "#load-switch", "#settings"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360, name
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("nav >> text=Batch")
    assert page.evaluate("location.hash") == "#batch"


def test_the_keyboard_is_enough(open_page):
    page = open_page()
    focused = "document.activeElement.id || document.activeElement.className"
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == "skip"
    page.keyboard.press("Enter")
    page.keyboard.type(PROMPT)
    assert page.evaluate(focused) == "prompt"
    page.keyboard.press("Shift+Enter")
    page.keyboard.press("Enter")
    ended(page)
    reached = []
    for _ in range(14):
        page.keyboard.press("Tab")
        name = page.evaluate(focused + " || document.activeElement.tagName")
        reached.append(name)
        if name == "SUMMARY":
            page.keyboard.press("Enter")
        if name == "load":
            page.keyboard.press("ArrowRight")
    assert [
        name for name in reached if name in ("send", "SUMMARY", "system", "temperature", "pause", "load", "load-switch")
    ] == ["send", "SUMMARY", "system", "temperature", "pause", "load", "load-switch"]
    assert page.get_attribute("#settings", "open") is not None
    assert page.inner_text("#load-count") == "9 requests"


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_no_serious_finding_of_axe(look, open_page):
    axe = find_spec("axe_playwright_python")
    if axe is None or axe.origin is None:
        pytest.skip("needs axe-core: pip install axe-playwright-python")
    options = {"viewport": {"width": 360, "height": 740}} if look == "phone" else {"color_scheme": look}
    page = open_page(**options)
    dark = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((part) => part < 60)"
    assert page.evaluate(dark) == (look == "dark")
    page.evaluate("settings.open = true")
    page.check("#beside")
    ask(page, limit="30")
    ended(page, 2)
    page.evaluate(Path(axe.origin).with_name("axe.min.js").read_text())
    found = page.evaluate("axe.run().then((result) => result.violations)")
    told = [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found]
    assert [each for each, raw in zip(told, found, strict=True) if raw["impact"] in ("serious", "critical")] == []
    assert told == []


# -- keys, restarts, old pages ---------------------------------------------------------------------------------------


def test_a_key_is_asked_for_and_a_wrong_one_told(open_page):
    page = open_page(key="", wait="#key-dialog[open]")
    assert page.evaluate("document.activeElement.id") == "key"
    for wrong in ("sk-a-wrong-key-0000000", "", "sk-\u00fcber-16-characters", "sk-another-wrong-key-0"):
        page.keyboard.type(wrong)
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-note.error")
        until(page, "document.getElementById('key-dialog').open && document.getElementById('key').value === ''")
        assert "does not take this key" in page.inner_text("#key-note")
    for _ in range(3):
        page.keyboard.press("Escape")
        page.wait_for_selector("#key-dialog[open]")
    page.focus("#key")
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(LIVE)
    ask(page, limit="5")
    ended(page)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert KEY not in page.url


def test_an_old_page_is_told_that_the_server_has_another(open_page):
    page = open_page()
    hello = {"format": 1, "build": "another", "version": "9"}
    page.route("**/live", lambda route: route.fulfill(body=f"event: hello\ndata: {json.dumps(hello)}\n\n"))
    hide_and_show(page)
    page.wait_for_selector("#banner:not([hidden])")
    assert "newer page" in page.inner_text("#banner")
    assert page.is_visible("#reload")


def test_a_format_that_the_page_does_not_know_is_not_drawn(open_page):
    page = open_page()
    other = {"format": 2, "build": "another", "version": "9"}
    events = f"event: hello\ndata: {json.dumps(other)}\n\nevent: snapshot\ndata: {{}}\n\n"
    page.route("**/live", lambda route: route.fulfill(body=events))
    hide_and_show(page)
    page.wait_for_selector("#banner:not([hidden])")
    assert "another format" in page.inner_text("#banner")


@pytest.mark.parametrize("body", ["event: snapshot\ndata: {", "x" * (5 << 20)], ids=["cut", "endless"])
def test_a_stream_of_snapshots_that_breaks_is_begun_again(body, open_page):
    page = open_page()
    page.route("**/live", lambda route: route.fulfill(body=body), times=1)
    hide_and_show(page)
    page.wait_for_timeout(200)
    page.wait_for_selector(LIVE)


def hide_and_show(page: Any) -> None:
    """Let the page look away and back again, so that it asks for snapshots anew."""
    page.evaluate(
        """for (const hidden of [true, false]) {
          Object.defineProperty(document, "hidden", { configurable: true, get: () => hidden });
          document.dispatchEvent(new Event("visibilitychange"));
        }"""
    )


def test_a_server_that_was_started_again_is_found(open_page, server):
    page = open_page()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if "echo_trt.gateway" in process.cmdline() or "tritonserver" in process.cmdline()[0]:
            process.kill()
    page.wait_for_selector('#state[data-state="away"]')
    page.wait_for_selector(LIVE, timeout=4 * SECONDS)
    ask(page, limit="5")
    ended(page)
    assert page.locator(".answer .t").count() > 0


# -- what the model writes is text -----------------------------------------------------------------------------------

ATTACKS = (
    "<img src=x onerror=window.hit=1>",
    "<script>window.hit=1</script><svg onload=window.hit=1>",
    "![a](https://evil.example/a.png) [b](javascript:window.hit=1)",
    "<style>*{display:none}</style><a href=//evil.example>c</a>",
    "\u202egnp.exe\u2066 \u05d0\u05d1 \u200f",
)


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_the_model_writes_is_text(attack, open_page):
    page = open_page()
    ask(page, attack, schema=json.dumps({"const": attack}), limit="400")
    ended(page)
    assert json.loads(page.text_content(".answer .text")) == attack
    assert page.text_content(".said") == attack
    assert page.evaluate("window.hit") is None
    assert page.locator("#log img, #log a, #log script, #log style, #log svg").count() == 0
    for name in (".said", ".answer .text"):
        style = f"getComputedStyle(document.querySelector('{name}')).unicodeBidi"
        assert page.evaluate(style) == "isolate"
    assert page.is_visible("#send")


def chunk(**choice: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': {}, **choice}]})}\n\n"


def test_a_long_answer_leaves_the_page_at_work(open_page):
    page = open_page()
    tokens = [{"token": "x", "bytes": [120] * 30, "source": "head", "probability": 0.5}] * 1000
    many = "".join(chunk(token_sources=tokens) for _ in range(50))
    body = many + chunk(delta={"content": "<b>" * 400_000}) + "data: [DONE]\n\n"
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    ended(page)
    assert page.locator(".answer .t").count() < 10_000
    assert len(page.text_content(".answer .text")) <= 1_000_000
    assert "Only the first 1,000,000 characters" in page.inner_text(".answer .error")
    begin = time.monotonic()
    page.fill("#prompt", "still here")
    assert time.monotonic() - begin < 10
    assert page.locator("#log .text b").count() == 0


def test_calls_of_tools_are_shown_where_the_model_knows_tools(open_page, server):
    page, sent = open_page(), []
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    calls = (
        {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}},
        {"index": 0, "function": {"arguments": '{"place": "<b>here</b>"}'}},
    )
    body = "".join(chunk(delta={"tool_calls": [call]}) for call in calls) + "data: [DONE]\n\n"

    def answer(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(body=body, content_type="text/event-stream")

    about = httpx.get(f"{origin(server)}live/about", headers={"authorization": f"Bearer {KEY}"}).json()
    page.route("**/live/about", lambda route: route.fulfill(json={**about, "takes_tools": True}))
    page.route("**/v1/chat/completions", answer)
    page.reload()
    page.wait_for_selector(LIVE)
    page.evaluate("settings.open = true")
    assert page.is_visible("#tools-field")
    ask(page, tools=json.dumps(tools))
    ended(page)
    assert sent[0]["tools"] == tools
    assert page.text_content(".answer .calls") == 'weather {"place": "<b>here</b>"}'


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (chunk(delta={"content": "half"}), "The connection was cut, so this answer is not complete."),
        (f"data: {json.dumps({'error': {'message': 'The <b>engine</b> failed.'}})}\n\n", "The <b>engine</b> failed."),
        ("data: {\n\n", "The connection was cut, so this answer is not complete."),
    ],
    ids=["cut", "error", "nonsense"],
)
def test_an_answer_that_breaks_off_is_told(body, told, open_page):
    page = open_page()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    ended(page)
    assert page.inner_text(".answer .error") == told
