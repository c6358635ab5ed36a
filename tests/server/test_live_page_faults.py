"""The live page where something is wrong or hostile: keys, restarts, old pages, broken streams, attacks by text."""

from __future__ import annotations

import json

import psutil
import pytest
from server.pages import CHROMIUM, LIVE, SECONDS, ask, chunk, ended, hide_and_show, needs_page, origin, until
from server.running import KEY

pytestmark = needs_page
SERVE = ("--batch", 8)


# -- keys, restarts, old pages ---------------------------------------------------------------------------------------


def give_key_and_ask(page):
    """Type the key into the dialog that has the focus, and wait for a short answer."""
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    page.wait_for_selector(LIVE)
    ask(page, limit="5")
    ended(page)


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
    give_key_and_ask(page)
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    assert KEY not in page.url


def test_a_browser_that_denies_storage_asks_for_the_key_again(browser, server, tmp_path):
    """Chromium denies a page its storage where it may keep no cookies."""
    denied = {"profile": {"default_content_setting_values": {"cookies": 2}}}
    (tmp_path / "Default").mkdir()
    (tmp_path / "Default" / "Preferences").write_text(json.dumps(denied))
    context = browser.browser_type.launch_persistent_context(
        tmp_path, executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SECONDS
    )
    try:
        page, complaints = context.new_page(), []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(origin(server))
        for _ in range(2):
            page.wait_for_selector("#key-dialog[open]")
            give_key_and_ask(page)
            page.reload()
        attempt = "() => { try { return sessionStorage.length } catch (error) { return error.name } }"
        assert page.evaluate(attempt) == "SecurityError"
        assert complaints == []
    finally:
        context.close()


@pytest.mark.parametrize(("format", "output"), [(1, "newer page"), (2, "another format")])
def test_a_page_is_told_that_the_server_has_another_or_another_format(format, output, open_page):
    page, hello = open_page(), {"format": format, "build": "another", "version": "9"}
    events = f"event: hello\ndata: {json.dumps(hello)}\n\nevent: snapshot\ndata: {{}}\n\n"
    page.route("**/live", lambda route: route.fulfill(body=events if format == 2 else events.split("event: snap")[0]))
    hide_and_show(page)
    page.wait_for_selector("#banner:not([hidden])")
    assert output in page.inner_text("#banner")
    assert page.is_visible("#reload")


@pytest.mark.parametrize("body", ["event: snapshot\ndata: {", "x" * (5 << 20)], ids=["cut", "endless"])
def test_a_stream_of_snapshots_that_breaks_is_begun_again(body, open_page):
    page = open_page()
    page.route("**/live", lambda route: route.fulfill(body=body), times=1)
    hide_and_show(page)
    page.wait_for_timeout(200)
    page.wait_for_selector(LIVE)


def test_a_server_that_was_started_again_is_found(open_page, server):
    page = open_page()
    for process in psutil.Process(server.process.pid).children(recursive=True):
        if {"echo_trt.server", "echo_trt.engine.process"} & {*process.cmdline()}:
            process.kill()
    page.wait_for_selector('#state[data-state="away"]')
    page.wait_for_selector(LIVE, timeout=4 * SECONDS)
    ask(page, limit="5")
    ended(page)
    assert page.locator(".answer .t").count() > 0


# -- what the model writes is text -----------------------------------------------------------------------------------

ATTACKS = (
    "<img src=x onerror=window.hit=1><script>window.hit=1</script><svg onload=window.hit=1><style>*{display:none}",
    "![a](https://evil.example/a.png) [b](javascript:window.hit=1) \u202egnp.exe\u2066 \u05d0\u05d1 \u200f",
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


@pytest.mark.parametrize(
    ("body", "reported"),
    [
        (chunk(delta={"content": "half"}), "The connection was cut, so this answer is not complete."),
        (f"data: {json.dumps({'error': {'message': 'The <b>engine</b> failed.'}})}\n\n", "The <b>engine</b> failed."),
        ("data: {\n\n", "The connection was cut, so this answer is not complete."),
    ],
    ids=["cut", "error", "nonsense"],
)
def test_an_answer_that_breaks_off_is_told(body, reported, open_page):
    page = open_page()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    ask(page)
    ended(page)
    assert page.inner_text(".answer .error") == reported
