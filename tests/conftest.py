"""Bundles of tiny pairs (pairs.py), built once, by the first process that has a test which asks for them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from pairs import recipe_of, reference_engines, write_networks
from transformers.utils import logging

from echo_trt.commands.build import build
from echo_trt.runtime.llm import LLM

settings.register_profile("untimed", deadline=None)  # a busy machine is no failure
settings.load_profile("untimed")


@pytest.fixture(autouse=True, scope="session")
def _one_quiet_thread() -> Iterator[None]:
    """The networks here are tiny: threads and progress bars only get in the way."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
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


@pytest.fixture(scope="session")
def networks(made_once) -> Path:
    return made_once("networks", write_networks)


@pytest.fixture(scope="session")
def bundle_of(made_once, networks, tmp_path_factory) -> Callable[[str], Path]:
    """pair -> its bundle, in fp32, a copy of this process's own."""
    folder = tmp_path_factory.mktemp("bundles")

    def get(pair: str) -> Path:
        if not (folder / pair).exists():
            bundle = made_once(f"bundle-{pair}", lambda out: build(recipe_of(pair, networks), networks, out))
            shutil.copytree(bundle, folder / pair)
        return folder / pair

    return get


@pytest.fixture(scope="session")
def open_llm(bundle_of, networks) -> Callable[..., LLM]:
    """An LLM of its own for each test; with engine "torch" the reference runs behind the same loop."""

    def get(pair: str, policy: str = "echo", batch: int = 3, engine: str = "openvino") -> LLM:
        llm = LLM(bundle_of(pair), policy, batch)
        if engine == "torch":
            engines = reference_engines(pair, networks, llm.loop.target.num_blocks)
            llm.loop.target = engines["target"]
            if "draft" in engines:
                llm.loop.drafter.engine = engines["draft"]
        return llm

    return get


@pytest.fixture
def with_limits(bundle_of, tmp_path) -> Callable[..., Path]:
    """The bundle of a pair whose recipe has other limits, such as ``kv_blocks``."""

    def get(pair: str, **limits: object) -> Path:
        folder = tmp_path / pair
        shutil.copytree(bundle_of(pair), folder)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["recipe"]["limits"] |= limits
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return folder

    return get
