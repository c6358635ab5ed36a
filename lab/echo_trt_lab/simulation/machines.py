"""The seconds of passes on a machine: measured tables for this one, rooflines from data sheets for others.

A roofline takes the slower of reading a pass's weights and doing its arithmetic, at a stated share of the peak. It
knows nothing of kernels: its values are rough, and ratios of values are better.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from pydantic import (
    BaseModel,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from echo_trt.backends.cuda.sizes import SIZES
from echo_trt.bundle.costs import CostTable
from echo_trt.bundle.stored import read_stored
from echo_trt.errors import UserError, first_mistake
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


_SMALL_KERNELS, _DRAFT_SMALL_KERNELS, _ALL_REDUCE = 0.3e-3, 0.1e-3, 10e-6
_DEVICE = DeviceCosts(launch=10e-6, wait=30e-6)
_HEAD_KV_BYTES = 8 * 128 * 2 * 2  # of a cached token


class MachinePart(BaseModel, extra="forbid"):
    """A part of a machine's file; what it does not know is an error."""


class Cards(MachinePart):
    """Peaks of a card: bytes/s, dense bf16 FLOP/s, bytes of memory, bytes/s to another card in one direction."""

    bandwidth: PositiveFloat
    flops: PositiveFloat
    memory: PositiveFloat
    bandwidth_share: PositiveFloat = 0.8
    flops_share: PositiveFloat = 0.6
    link: PositiveFloat = 1.0


class ModelShape(MachinePart):
    """A model: parameters of the input ``embedding``, of one ``expert`` over all layers, and the other ``dense`` ones.

    kv_values           of a cached token on one card
    flops, flops_share  of its precision; None: the card's in bf16
    """

    layers: PositiveInt
    hidden: PositiveInt
    kv_values: PositiveInt
    embedding: PositiveFloat
    dense: PositiveFloat
    parameter_bytes: PositiveFloat
    flops: PositiveFloat | None = None
    flops_share: PositiveFloat | None = None
    expert: NonNegativeFloat = 0
    experts: NonNegativeInt = 0
    experts_per_token: NonNegativeInt = 0


class MachineFile(MachinePart):
    """``cards`` alike that hold a model, tensor parallel, and each the whole of an EAGLE-3 head in bf16."""

    chip: Cards
    target: ModelShape
    head: PositiveFloat
    cards: PositiveInt = 1
    assumptions: tuple[str, ...] = ()


def from_machine_file(path: Path) -> Machine:
    """Compute the machine of a file such as those in ``cards/``. Raises UserError."""
    remedy = "name a machine's file, such as those in lab/echo_trt_lab/simulation/cards"
    try:
        given = MachineFile.model_validate(yaml.safe_load(path.read_text("utf-8")))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {remedy}.") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} is no YAML; {remedy}.") from error
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; {remedy}.") from error
    card, model, cards = given.chip, given.target, given.cards
    bf16 = Chip(card.bandwidth, card.flops, card.memory, card.bandwidth_share, card.flops_share)
    peaks = replace(bf16, flops=model.flops or card.flops, flops_share=model.flops_share or card.flops_share)
    target = NetworkShare(
        model.dense / cards,
        model.parameter_bytes,
        (model.dense + model.experts_per_token * model.expert) / cards,
        2 * model.kv_values,
        model.expert / cards,
        model.experts,
        model.experts_per_token,
    )
    head = NetworkShare(given.head, 2, given.head, _HEAD_KV_BYTES)
    reduces = 2 * model.layers if cards > 1 else 0
    per_token = reduces * 2 * (1 - 1 / cards) * model.hidden * 2 / card.link
    facts = f"EAGLE-3 head of {given.head / 1e9:.2f} B parameters in bf16, with 32,000 tokens of vocabulary"
    assumptions = [*given.assumptions, facts + (", whole on each GPU: it needs no all-reduce" if reduces else "")]
    if reduces:
        assumptions.append(
            f"two all-reduces a layer, {1e6 * _ALL_REDUCE:g} us each (assumed) and their bytes at "
            f"{card.link / 1e9:g} GB/s"
        )
    weights = model.parameter_bytes * (model.dense + model.embedding + model.experts * model.expert) / cards
    free = 0.9 * card.memory - weights - 2 * given.head
    return Machine(
        path.stem,
        _table(target, peaks, _SMALL_KERNELS + reduces * _ALL_REDUCE, per_token),
        _table(head, bf16, _DRAFT_SMALL_KERNELS),
        HOST_SECONDS,
        LEVEL_SECONDS,
        (
            *assumptions,
            f"small kernels take {1e3 * _SMALL_KERNELS:g} ms of a target pass and {1e3 * _DRAFT_SMALL_KERNELS:g} ms of "
            f"a draft pass, starting a CUDA graph {1e6 * _DEVICE.launch:g} us and waiting for results "
            f"{1e6 * _DEVICE.wait:g} us (assumed)",
            "levels between gates run in one go, and passes are padded, as on a GPU; every recorded child comes to the "
            "host",
        ),
        max(int(free / (target.kv_bytes + head.kv_bytes)), 0),
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


ROOFLINES = {file.stem: file for file in sorted(Path(__file__).with_name("cards").glob("*.yaml"))}
NAMES = (THIS, *ROOFLINES)


def machine_named(name: str, costs: Path | None) -> Machine:
    """Return the machine of one of NAMES or of a file; ``costs`` is the measured table of "this"."""
    if name not in NAMES and Path(name).suffix not in (".yaml", ".yml"):
        raise UserError(f"--machine is {name!r}; choose one of {', '.join(NAMES)}, or name a machine's YAML file.")
    if name != THIS:
        if costs is not None:
            raise UserError(f"--costs {costs} is not used with --machine {name}; leave one of them out.")
        return from_machine_file(ROOFLINES.get(name, Path(name)))
    if costs is None:
        raise UserError("--costs is missing, and --machine this needs it; name the costs.json of a bundle.")
    return from_costs_file(costs)
