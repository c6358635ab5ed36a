"""Graphics cards by name, with the peaks of NVIDIA's data sheets."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from echo_trt.errors import UserError
from echo_trt_lab.sizing.hardware import Chip, NetworkShare

USABLE = 0.9  # share of a card's memory; larger: less is left for driver, runtime and fragmentation


@dataclass(frozen=True)
class Card:
    """A card: its CUDA compute capability, streaming multiprocessors, and dense bf16 peaks and memory as labelled."""

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
_LARGEST_KNEE = 1 << 16  # tokens of a pass; larger: a knee is sought further, in more memory


def parse_cards(text: str) -> tuple[Card, int]:
    """Read a card and the number of cards from a text such as ``"H100-80GB x8"`` or ``"RTX 4090"``."""
    words = re.fullmatch(r"\s*(\S.*?)(?:(?<!RT)\s*x\s*(\d+))?\s*", text, re.IGNORECASE)  # RT: of RTX 4090
    if words is None:
        raise UserError(f'--fit is {text!r}; name a card and how many there are, like "H100-80GB x8".')
    name, count = words[1], int(words[2] or 1)
    if not 1 <= count <= 1024:
        raise UserError(f"--fit asks for {count} cards; give a number from 1 to 1024.")
    matches = [card for key, card in CARDS.items() if _plain(key) == _plain(name)]
    matches = matches or [card for key, card in CARDS.items() if _plain(key).startswith(_plain(name))]
    if len(matches) != 1:
        names = ", ".join(card.name for card in matches or CARDS.values())
        problem = "could be several cards" if matches else "is not known"
        raise UserError(f'--fit: card {name!r} {problem}; use one of {names}, like "L4 x2".')
    return matches[0], count


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()


def knee(network: NetworkShare, chip: Chip) -> int:
    """Compute the paper's K_max: the tokens of a pass at which arithmetic takes as long as reading the weights."""
    tokens = np.arange(1, _LARGEST_KNEE + 1)
    memory = network.bytes_read(tokens) / (chip.bandwidth * chip.bandwidth_share)
    compute = 2 * network.active * tokens / (chip.flops * chip.flops_share)
    return int(tokens[np.argmax(compute >= memory)]) if (compute >= memory).any() else _LARGEST_KNEE
