"""The kernel of seeded draws against the host's draws, in Triton's interpreter (on a GPU, where there is one)."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from echo_trt.backends.cuda.choose import race_by
from echo_trt.speculation.sampling.draw import sample

triton = pytest.importorskip("triton", reason="needs Triton: pip install -e '.[cuda]'")


@pytest.fixture(scope="module")
def kernel():
    if torch.cuda.is_available():
        from echo_trt.backends.cuda import race_kernel

        return race_kernel.race
    spec = importlib.util.find_spec("echo_trt.backends.cuda.race_kernel")
    module = importlib.util.module_from_spec(spec)
    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(module)
    return module.race


@pytest.mark.parametrize("size", [7, 512, 1500])
def test_a_draw_is_the_hosts(kernel, size):
    rng = np.random.default_rng(size)
    logits = (3 * rng.standard_normal((12, size))).astype(np.float32)
    logits[::3, rng.random(size) < 0.8] = -np.inf
    logits[:, 0] = -5
    temperature = rng.choice([0.3, 0.8, 1.0, 1.9], 12)
    seed, position = rng.integers(-(2**63), 2**63 - 1, 12), rng.integers(0, 1 << 40, 12)
    off = np.zeros(12, np.int64)
    wanted = sample(logits, temperature, off, np.ones(12), seed, position)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    running, inverse, *others = (torch.from_numpy(a).to(device) for a in (logits, 1 / temperature, seed, position))
    found = race_by(kernel, running, running.amax(dim=1), inverse, *others)
    assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize("capability", [80, 90, 120])
def test_it_compiles_for_cards(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from echo_trt.backends.cuda import race_kernel

    names = race_kernel.race.arg_names
    types = ["*fp32", "*fp64", "*fp64", "*i64", "*i64", "*fp64", "*i64", "i32", "i32", "constexpr"]
    source = ASTSource(race_kernel.race, dict(zip(names, types, strict=True)), {"CALLS": 128})
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert compiled.metadata.shared == 0  # the lanes never meet
