"""The profiles of hypothesis, the markers of layers, and bundles of tiny pairs (pairs.py).

A bundle is built once, by the first process that has a test which asks for it. What is heavy (PyTorch, the engines) is
imported by fixtures alone, so that the pure layer runs without it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from hypothesis import settings
from layers import HEAVY, has_pure, layer

if TYPE_CHECKING:
    from echo_trt.engine.llm import LLM

settings.register_profile("dev", max_examples=20, deadline=None)  # a busy machine is no failure
settings.register_profile("ci", max_examples=150, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or "dev")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Spare a run of the pure layer the imports of the others."""
    if config.option.markexpr == "pure" and Path(__file__).parent in collection_path.parents:
        return not has_pure(collection_path) or None
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark a test with its layer."""
    item.add_marker(layer(item.path))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Fail a test that imports a heavy library in a run of the pure layer."""
    result = yield
    if item.config.option.markexpr == "pure":
        assert not HEAVY & sys.modules.keys()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files: one that begins last sets the end of a run in several processes."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    order = ("server", "kernel", "engine", "gpu", "pure")
    items.sort(key=lambda item: (item.path not in slow, order.index(layer(item.path))))


@pytest.fixture(autouse=True, scope="session")
def _one_quiet_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run with one thread and without progress bars, which slow tiny networks, here and in processes of tests.

    What passes cost is measured for a fraction of the usual seconds.
    """
    if request.config.option.markexpr == "pure":
        yield
        return
    import torch
    from transformers.utils import logging

    from echo_trt.engine.measure import measure

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    gc.set_threshold(50_000, 20, 20)  # as it is by default, a tenth of a trace's time is the collector's
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setattr("echo_trt.engine.tuning.measure", partial(measure, seconds=0.4))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Callable[[str, Callable[[Path], object]], Path]:
    """name, make -> the folder that ``make`` wrote, in whichever process of this run came first. Only to be read."""
    own = tmp_path_factory.getbasetemp()
    folder = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def get(name: str, make: Callable[[Path], object]) -> Path:
        with FileLock(folder / f"{name}.lock"):
            if not (folder / name).exists():
                make(folder / f"{name}.part")
                (folder / f"{name}.part").rename(folder / name)
        return folder / name

    return get


@pytest.fixture(autouse=True, scope="session")
def _traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Trace a network once per run (traced.py)."""
    if request.config.option.markexpr == "pure":
        yield
        return
    from traced import trace_once

    with pytest.MonkeyPatch.context() as patch:
        trace_once(patch, request.getfixturevalue("made_once"))
        yield


@pytest.fixture(scope="session")
def networks(made_once) -> Path:
    from pairs import write_networks

    return made_once("networks", write_networks)


@pytest.fixture(scope="session")
def bundle_of(made_once, networks, tmp_path_factory) -> Callable[[str], Path]:
    """pair -> its bundle, in fp32, a copy of this process's own."""
    from pairs import recipe_of

    from echo_trt.cli.build import build

    folder = tmp_path_factory.mktemp("bundles")

    def get(pair: str) -> Path:
        if not (folder / pair).exists():
            bundle = made_once(f"bundle-{pair}", lambda out: build(recipe_of(pair, networks), networks, out))
            shutil.copytree(bundle, folder / pair)
        return folder / pair

    return get


@pytest.fixture(scope="session")
def tool_bundle(made_once, tmp_path_factory) -> Callable[[str], Path]:
    """kind (tool_models.py) -> the bundle of its model. Only to be read."""
    import tool_models

    from echo_trt.cli.build import build

    def make(kind: str, out: Path) -> None:
        folder = tmp_path_factory.mktemp(kind)
        build(tool_models.write(folder, kind), folder, out)

    return lambda kind: made_once(f"tools-{kind}", lambda out: make(kind, out))


@pytest.fixture(scope="session")
def open_llm(bundle_of, networks) -> Callable[..., LLM]:
    """Return an LLM of its own for each test; with engine "torch" the reference runs behind the same loop.

    With "resident" it does what it would do on a GPU: features, states and choices stay where the networks are.
    """
    from pairs import reference_engines

    from echo_trt.backends.states import KeptStates
    from echo_trt.engine.assemble import drafter_with
    from echo_trt.engine.llm import LLM

    def get(pair: str, policy: str = "echo", batch: int = 3, engine: str = "openvino") -> LLM:
        llm = LLM(bundle_of(pair), policy, batch)
        if engine in ("torch", "resident"):
            blocks, batch = llm.loop.target.num_blocks, llm.loop.batch.count
            engines = reference_engines(pair, networks, blocks, batch, engine == "resident")
            llm.loop.target = target = engines["target"]
            if target.states:
                llm.loop.batch.blocks.states = KeptStates(target.states)
            if "draft" in engines:
                llm.loop.drafter = drafter_with(llm.manifest, llm.loop.batch, engines["draft"], bundle_of(pair))
        return llm

    return get


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Iterator[Callable[[str, str, str], Path]]:
    """Install a package of one module: its name, its code, and its entry points."""
    from echo_trt.files import extras

    modules = sys.modules.copy()

    def install(name: str, code: str, entry_points: str) -> Path:
        facts = tmp_path / "site" / f"{name}-1.0.dist-info"
        facts.mkdir(parents=True)
        (tmp_path / "site" / f"{name}.py").write_text(code)
        (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (facts / "entry_points.txt").write_text(entry_points)
        monkeypatch.syspath_prepend(tmp_path / "site")
        extras._entry_points.cache_clear()
        return tmp_path / "site"

    yield install
    for each in (extras._entry_points, extras.extra):
        each.cache_clear()
    for name in sys.modules.keys() - modules.keys():
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == tmp_path / "site":
            del sys.modules[name]


@pytest.fixture
def with_limits(bundle_of, tmp_path) -> Callable[..., Path]:
    """Return the bundle of a pair whose recipe has other limits, such as ``kv_blocks``."""

    def get(pair: str, **limits: object) -> Path:
        folder = tmp_path / pair
        shutil.copytree(bundle_of(pair), folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["recipe"]["limits"] |= limits
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return get
