"""Graphics cards by name, with the peaks of their makers' data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from echo_trt.errors import UserError
from echo_trt.simulation.machines import Chip, Network

USABLE = 0.9  # of a card's memory: the rest is the driver's, the runtime's and fragmentation's


@dataclass(frozen=True)
class Card:
    """``capability``: CUDA compute capability; ``processors``: streaming multiprocessors. ``chip``: bytes/s, dense bf16
    FLOP/s, bytes (of the GB on the label)."""

    name: str
    capability: str
    processors: int
    chip: Chip

    @property
    def usable(self) -> int:
        return int(USABLE * self.chip.memory)


def _card(
    name: str, capability: str, processors: int, gigabytes: float, gigabytes_per_s: float, teraflops: float
) -> Card:
    return Card(name, capability, processors, Chip(gigabytes_per_s * 1e9, teraflops * 1e12, gigabytes * 1e9))


# NVIDIA's data sheets and architecture papers. FLOP/s: bf16 tensor cores, fp32 accumulation, without sparsity.
CARDS = {
    card.name: card
    for card in (
        _card("A10", "8.6", 72, 24, 600, 125),
        _card("A100-40GB", "8.0", 108, 40, 1555, 312),
        _card("A100-80GB", "8.0", 108, 80, 2039, 312),
        _card("L4", "8.9", 58, 24, 300, 121),
        _card("L40S", "8.9", 142, 48, 864, 362),
        _card("H100-80GB", "9.0", 132, 80, 3350, 989),
        _card("H100-PCIe", "9.0", 114, 80, 2000, 756),
        _card("H200", "9.0", 132, 141, 4800, 989),
        _card("B200", "10.0", 148, 180, 8000, 2250),
        _card("RTX-3090", "8.6", 82, 24, 936, 71),
        _card("RTX-4090", "8.9", 128, 24, 1008, 165),
        _card("RTX-5090", "12.0", 170, 32, 1792, 209),
        _card("RTX-PRO-6000", "12.0", 188, 96, 1792, 504),
    )
}
#: What TensorRT-RTX 1.7 builds engines for.
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
_MOST = 1 << 16  # tokens of a pass, up to which a knee is sought


def parse_cards(text: str) -> tuple[Card, int]:
    """``"H100-80GB x8"`` or ``"RTX 4090"``: a card and how many of them."""
    words = re.fullmatch(r"\s*(\S.*?)(?:\s+x\s*(\d+))?\s*", text, re.IGNORECASE)
    if words is None:
        raise UserError(f'--fit is {text!r}; name a card and how many there are, like "H100-80GB x8".')
    name, count = words[1], int(words[2] or 1)
    if not 1 <= count <= 1024:
        raise UserError(f"--fit asks for {count} cards; give a number from 1 to 1024.")
    found = [card for key, card in CARDS.items() if _plain(key) == _plain(name)]
    found = found or [card for key, card in CARDS.items() if _plain(key).startswith(_plain(name))]
    if len(found) != 1:
        among = found or CARDS.values()
        said = "could be several cards" if found else "is not known"
        raise UserError(f'--fit: card {name!r} {said}; use one of {", ".join(c.name for c in among)}, like "L4 x2".')
    return found[0], count


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def knee(network: Network, chip: Chip) -> int:
    """The paper's K_max: the tokens of a pass from which its arithmetic takes longer than reading its weights."""
    tokens = np.arange(1, _MOST + 1)
    memory = network.bytes_read(tokens) / (chip.bandwidth * chip.bandwidth_share)
    compute = 2 * network.active * tokens / (chip.flops * chip.flops_share)
    return int(tokens[np.argmax(compute >= memory)]) if (compute >= memory).any() else _MOST
