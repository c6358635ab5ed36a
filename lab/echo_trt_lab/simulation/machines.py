"""The seconds of passes on a machine: measured tables for this one, rooflines from data sheets for others.

A roofline takes the slower of reading a pass's weights and doing its arithmetic, at a stated share of the peak. It
knows nothing of kernels: its values are rough, and ratios of values are better.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from echo_trt.backends.cuda.sizes import SIZES
from echo_trt.bundle.costs import CostTable
from echo_trt.bundle.stored import read_stored
from echo_trt.errors import UserError
from echo_trt.speculation.arrays import next_size
from echo_trt.speculation.echo.budget import fit_hinge
from echo_trt.speculation.goodput.model.costs import Costs, Curve
from echo_trt_lab.sizing.hardware import Chip, NetworkShare

THIS = "this"
# Seconds on the host: an iteration's packing, accepting and text, and a draft level's planning. Measured on 2 cores of
# an AMD EPYC at batch 1 to 8. Larger: small batches gain less from drafts.
HOST_SECONDS, LEVEL_SECONDS = 0.5e-3, 0.3e-3
# Seconds of goodput's search for every node that it considers. Fitted to plans over recorded trees, 1 to 512 requests
# of both H100s here, on two cores of another EPYC (family 25, model 1), within a third. Larger: goodput gains less.
CANDIDATE_SECONDS = 0.85e-6
# The same for a node that any policy considers, where a device drafts and the host reads. Fitted to processor time of
# the device path's host, 1 to 64 requests (``device_counts``), on two cores of an EPYC (family 26, model 2). Larger:
# policies that consider many nodes gain less.
NODE_SECONDS = 0.45e-6
LARGEST_KNEE = 1024  # tokens up to which the hinge is fitted; larger: the far end of the curve moves K_max


@dataclass(frozen=True)
class DeviceCosts:
    """An accelerator that a host drives.

    launch  seconds to start a CUDA graph
    wait    seconds in which results come to the host, and the host goes on
    sizes   to which passes of the draft over committed tokens are padded
    """

    launch: float
    wait: float
    sizes: tuple[int, ...] = SIZES

    def seconds(self, launches: int, waits: int = 1) -> float:
        return self.launch * launches + self.wait * waits


@dataclass(frozen=True)
class Machine:
    """The costs of passes on a machine.

    target, draft      ``Curve``'s first arguments: sizes int [m], tokens; seconds float [m]; seconds that a cached
                       token adds to a pass, and for every tree node that attends it
    host_seconds       of an iteration, outside passes
    level_seconds      of planning a draft level
    assumptions        sentences for the user
    capacity           tokens in the KV cache; None: unknown
    cold, change       seconds, as in ``Costs``
    padded             sizes of the target's passes, as in ``Costs``
    knee               K_max where it was measured; None: fitted to ``target``
    candidate_seconds  of planning a node that goodput considers
    node_seconds       of planning a node that another policy considers
    device             of an accelerator on which a head drafts levels in one go; None: it drafts level by level
    """

    name: str
    target: tuple[np.ndarray, np.ndarray, float, float]
    draft: tuple[np.ndarray, np.ndarray, float, float]
    host_seconds: float
    level_seconds: float
    assumptions: tuple[str, ...]
    capacity: int | None = None
    cold: float = 0.0
    change: float = 0.0
    padded: tuple[int, ...] = ()
    knee: int | None = None
    candidate_seconds: float = CANDIDATE_SECONDS
    node_seconds: float = 0.0
    device: DeviceCosts | None = None

    def costs(self) -> Costs:
        """Make new curves, which a policy may correct."""
        return Costs(Curve(*self.target), Curve(*self.draft), self.cold, self.change, self.padded)

    @property
    def k_max(self) -> int:
        """The knee of the paper's cost model, raised to the padded size."""
        sizes, seconds, *_ = self.target
        near = sizes <= LARGEST_KNEE
        knee = self.knee or fit_hinge(sizes[near], seconds[near]).k_max
        return next_size(self.padded, knee)


def roofline(network: NetworkShare, chip: Chip, tokens: np.ndarray, fixed: float, per_token: float = 0.0) -> np.ndarray:
    """Compute seconds [m] of passes over ``tokens`` [m]: memory or arithmetic, plus ``fixed`` and ``per_token`` * N.

    The corner is rounded, (memory^4 + compute^4)^(1/4): near it neither hides the other altogether.
    """
    memory = network.bytes_read(tokens) / (chip.bandwidth * chip.bandwidth_share)
    compute = 2 * network.active * tokens / (chip.flops * chip.flops_share)
    return fixed + per_token * tokens + (memory**4 + compute**4) ** 0.25


def sizes_upto(maximum: int) -> np.ndarray:
    """List all sizes to 16, then sizes in steps of a fifth: int64 [m]."""
    steps = 16 * 1.2 ** np.arange(1 + np.ceil(np.log(maximum / 16) / np.log(1.2)))
    return np.unique(np.concatenate((np.arange(1, 17), steps.round().astype(np.int64))))


def _table(
    network: NetworkShare, chip: Chip, fixed: float, per_token: float = 0.0
) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Tabulate a ``Machine``'s target or draft. A tree's nodes read their request's KV cache together, once."""
    sizes = sizes_upto(16384)
    per_context = network.kv_bytes / (chip.bandwidth * chip.bandwidth_share)
    return sizes, roofline(network, chip, sizes, fixed, per_token), per_context, 0.0


# H100 SXM5 80 GB, NVIDIA's data sheet: 3.35 TB/s, 989 TFLOP/s in bf16 and 1,979 in fp8, both dense; NVLink 900 GB/s.
H100 = Chip(bandwidth=3.35e12, flops=989e12, memory=80e9, bandwidth_share=0.88)
H100_FP8 = Chip(bandwidth=3.35e12, flops=1979e12, memory=80e9, bandwidth_share=0.88, flops_share=0.45)
NVLINK = 450e9  # bytes/s in one direction

# Qwen3-8B's config.json: 36 layers, hidden 4096, 8 KV heads of 128, vocabulary 151,936; 8.2 B parameters.
_EMBEDDING = 151_936 * 4096
QWEN3_8B = NetworkShare(
    dense=8.2e9 - _EMBEDDING, parameter_bytes=2, active=8.2e9 - _EMBEDDING, kv_bytes=36 * 8 * 128 * 2 * 2
)
# EAGLE-3's head for it: fc 4096x12288, q 8192x4096, k and v 8192x1024, o 4096x4096, MLP 3x4096x12288, and an lm_head
# of 32000x4096.
_HEAD = 4096 * (12288 + 8192 + 2 * 2048 + 4096 + 3 * 12288 + 32000)
EAGLE3_HEAD = NetworkShare(dense=_HEAD, parameter_bytes=2, active=_HEAD, kv_bytes=8 * 128 * 2 * 2)
# Qwen3-235B-A22B's config.json: 94 layers, hidden 4096, 64 query and 4 KV heads of 128, 128 experts of 3x4096x1536 of
# which 8 per token. One of 8 GPUs holds an eighth of every matrix, and one KV head: two GPUs hold the same head.
_GPUS, _LAYERS = 8, 94
_ATTENTION = 4096 * 128 * (2 * 64 + 2 * 4) * _LAYERS
_EXPERT = 3 * 4096 * 1536 * _LAYERS
QWEN3_235B = NetworkShare(
    dense=(_ATTENTION + _EMBEDDING) / _GPUS,
    parameter_bytes=1,
    active=(_ATTENTION + _EMBEDDING + 8 * _EXPERT) / _GPUS,
    kv_bytes=_LAYERS * 128 * 2 * 2,
    expert=_EXPERT / _GPUS,
    experts=128,
    experts_per_token=8,
)
_SMALL_KERNELS, _DRAFT_SMALL_KERNELS, _ALL_REDUCE = 0.3e-3, 0.1e-3, 10e-6
_DEVICE = DeviceCosts(launch=10e-6, wait=30e-6)

_ON_DEVICE = (
    f"small kernels take {1e3 * _SMALL_KERNELS:g} ms of a target pass and {1e3 * _DRAFT_SMALL_KERNELS:g} ms of a draft "
    f"pass, starting a CUDA graph {1e6 * _DEVICE.launch:g} us and waiting for results {1e6 * _DEVICE.wait:g} us "
    "(assumed)",
    "levels between gates run in one go, and passes are padded, as on a GPU; every recorded child comes to the host",
)


def h100_qwen3_8b() -> Machine:
    free = 0.9 * H100.memory - 2 * 8.2e9 - 2 * _HEAD
    return Machine(
        "h100-qwen3-8b",
        _table(QWEN3_8B, H100, _SMALL_KERNELS),
        _table(EAGLE3_HEAD, H100, _DRAFT_SMALL_KERNELS),
        HOST_SECONDS,
        LEVEL_SECONDS,
        (
            "H100 SXM, NVIDIA's data sheet: 3.35 TB/s of which kernels reach 88 %, 989 bf16 TFLOP/s of which 60 %",
            "Qwen3-8B in bf16: a pass reads and multiplies its 8.2 B parameters but the input embedding's 0.62 B",
            "a cached token is 36 layers x 8 heads x 128 x 2 x 2 bytes; the arithmetic of attention is left out",
            f"EAGLE-3 head of {_HEAD / 1e9:.2f} B parameters in bf16, with 32,000 tokens of vocabulary",
            *_ON_DEVICE,
        ),
        int(free / (QWEN3_8B.kv_bytes + EAGLE3_HEAD.kv_bytes)),
        padded=SIZES,
        candidate_seconds=NODE_SECONDS,
        node_seconds=NODE_SECONDS,
        device=_DEVICE,
    )


def h100x8_qwen3_235b() -> Machine:
    """Eight GPUs: two all-reduces a layer, of a latency and 2 * 7/8 of N x 4096 bf16 values over NVLink."""
    reduces = 2 * _LAYERS
    per_token = reduces * 2 * (1 - 1 / _GPUS) * 4096 * 2 / NVLINK
    weights = QWEN3_235B.dense + 128 * QWEN3_235B.expert + _EMBEDDING / _GPUS
    free = 0.9 * H100.memory - weights - 2 * _HEAD
    return Machine(
        "8xh100-qwen3-235b",
        _table(QWEN3_235B, H100_FP8, _SMALL_KERNELS + reduces * _ALL_REDUCE, per_token),
        _table(EAGLE3_HEAD, H100, _DRAFT_SMALL_KERNELS),
        HOST_SECONDS,
        LEVEL_SECONDS,
        (
            "8 H100 SXM, NVIDIA's data sheet: 3.35 TB/s each, 88 % of it reached, 1,979 fp8 TFLOP/s, 45 % of it",
            "Qwen3-235B-A22B in fp8, tensor parallel: each GPU reads an eighth of the weights that a pass touches",
            "N tokens touch 128 (1 - (1 - 8/128)^N) experts per layer: routing is taken as uniform and independent, "
            "where real routing is skewed and a tree's tokens alike, so that fewer are touched",
            f"two all-reduces a layer, {1e6 * _ALL_REDUCE:g} us each (assumed) and their bytes at 450 GB/s (NVLink)",
            "the KV cache is bf16, 4 heads stand twice on 8 GPUs; the arithmetic of attention is left out",
            f"EAGLE-3 head of {_HEAD / 1e9:.2f} B parameters in bf16, whole on each GPU: it needs no all-reduce",
            *_ON_DEVICE,
        ),
        int(free / (QWEN3_235B.kv_bytes + EAGLE3_HEAD.kv_bytes)),
        padded=SIZES,
        candidate_seconds=NODE_SECONDS,
        node_seconds=NODE_SECONDS,
        device=_DEVICE,
    )


def from_costs_file(path: Path) -> Machine:
    """Read the machine on which ``echo-trt calibrate`` or ``bench`` measured a bundle's costs.json."""
    stored = read_stored(path, CostTable, "name a costs.json that echo-trt calibrate wrote")
    curves = (stored.target, stored.draft)
    target, draft = ((np.array(c.sizes), np.array(c.seconds), c.per_context, c.per_node) for c in curves)
    assumptions = (f"passes take what they took on {stored.machine} on {stored.measured}, without noise",)
    return Machine(
        stored.machine,
        target,
        draft,
        HOST_SECONDS,
        LEVEL_SECONDS,
        assumptions,
        cold=stored.cold,
        change=stored.change,
        padded=tuple(stored.sizes),
        knee=stored.hinge.k_max,
    )


ROOFLINES = {"h100-qwen3-8b": h100_qwen3_8b, "8xh100-qwen3-235b": h100x8_qwen3_235b}
NAMES = (THIS, *ROOFLINES)


def machine_named(name: str, costs: Path | None) -> Machine:
    """Return the machine of one of NAMES; ``costs`` is the measured table of "this"."""
    if name not in NAMES:
        raise UserError(f"--machine is {name!r}; choose one of {', '.join(NAMES)}.")
    if name != THIS:
        if costs is not None:
            raise UserError(f"--costs {costs} is not used with --machine {name}; leave one of them out.")
        return ROOFLINES[name]()
    if costs is None:
        raise UserError("--costs is missing, and --machine this needs it; name the costs.json of a bundle.")
    return from_costs_file(costs)
