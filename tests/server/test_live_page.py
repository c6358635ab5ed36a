"""The live page in a real Chromium, before the real server: the chat, the batch, and ways to look at it."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import pytest
from server.pages import LONG, PROMPT, answer_of, ask, ended, needs_page, until

pytestmark = needs_page
SERVE = ("--batch", 8)


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
    for word in ("first token", "tokens/s", "tokens per pass"):
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
    assert "times as fast as plain decoding, alone on the server." in page.inner_text(".verdict")


# -- the batch -------------------------------------------------------------------------------------------------------


def test_the_tree_moves_with_the_batch(open_page, server):
    page = open_page()
    with ThreadPoolExecutor(3) as pool:
        lengths = (1400, 700, 350)  # the last one is alone in the end, and is drafted for at any costs
        answers = [pool.submit(answer_of, server, max_tokens=length, ignore_eos=True) for length in lengths]
        times, drafted = {page.evaluate("tree.dataset.time")}, False
        while not all(answer.done() for answer in answers):
            times.add(page.evaluate("tree.dataset.time"))
            drafted |= page.evaluate("Number(tree.dataset.nodes) > Number(tree.dataset.requests)")
            time.sleep(0.05)
    assert len(times - {None}) > 2
    assert drafted
    assert "draft tokens: " in page.get_attribute("#tree", "aria-label")
    assert page.is_visible(".g-open") == ("goodput" not in page.inner_text("#policy"))  # which has no gates
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


@pytest.mark.parametrize("look", ["dark", "phone"])
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
    reported = [(each["id"], [node["html"][:120] for node in each["nodes"]]) for each in found]
    assert [each for each, raw in zip(reported, found, strict=True) if raw["impact"] in ("serious", "critical")] == []
    assert reported == []
