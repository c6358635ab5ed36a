"""Servers with a key: of this process, or as processes of their own; and pages of them in a browser."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine.service.served import Served
from pairs import LIMITS, recipe_of
from server.pages import CHROMIUM, LIVE, SECONDS, origin
from server.running import KEY, Door, engine_of, running

from echo_trt.cli.build import build


@pytest.fixture(scope="session")
def long_bundle(made_once, networks, tmp_path_factory) -> Path:
    """Return the pair close, with room for long answers: 4 requests of 1600 tokens."""
    recipe = recipe_of("close", networks, limits={**LIMITS, "batch": 4, "context": 1600})
    bundle = made_once("long", lambda out: build(recipe, networks, out))
    return shutil.copytree(bundle, tmp_path_factory.mktemp("long") / "close")


@pytest.fixture(scope="session")
def client() -> Iterator[httpx.Client]:
    """Return a client of a door without an engine."""
    with running() as client:
        yield client


@pytest.fixture(scope="session")
def keys(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text(KEY)
    return file


@pytest.fixture(scope="module")
def server(long_bundle, keys, request) -> Iterator[Served]:
    """Return a file's server of this process, whose ENGINE holds options of ``engine_of``; with SERVE it is
    ``process``.
    """
    if hasattr(request.module, "SERVE"):
        yield request.getfixturevalue("process")
        return
    with engine_of(long_bundle, **getattr(request.module, "ENGINE", {})) as engine:
        door = Door(engine, api_keys_file=keys, names=("echo", "close"))
        yield door
        door.kill()


@pytest.fixture(scope="module")
def process(long_bundle, keys, tmp_path_factory, request) -> Iterator[Served]:
    """Return a file's server as ``serve`` starts it, with the options that the file's SERVE holds."""
    log, options = tmp_path_factory.mktemp("served") / "log", getattr(request.module, "SERVE", ())
    with Served(long_bundle, log, "--api-keys-file", keys, *options).wait_for("serving") as served:
        yield served
        assert KEY not in served.err


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, server) -> Iterator[Callable[..., Any]]:
    """Return a page in a context of its own. What it asks stays at its origin, and it breaks no rule of its own."""
    contexts, requested, complaints = [], [], []

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
        page.on("request", lambda request: requested.append(request.url))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text) if "Policy" in message.text else None)
        page.goto(origin(server))
        page.wait_for_selector(wait)
        return page

    yield get
    for context in contexts:
        context.close()
    assert {url for url in requested if not url.startswith(origin(server))} == set()
    assert complaints == []
