"""Cards by name, and the knee that their peaks give."""

import numpy as np
import pytest
from refusal import refused

from echo_trt.models.read_config import decoder_config
from echo_trt.sizing.networks import decoder_sizes
from echo_trt.sizing.shapes import published
from echo_trt_lab.sizing.cards import CARDS, knee, parse_cards
from echo_trt_lab.sizing.hardware import active_parameters, share_of


def qwen3(name: str, gpus: int = 1):
    return decoder_sizes(decoder_config(published()[f"Qwen/Qwen3-{name}"], name), gpus)


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("H100-80GB x8", "H100-80GB", 8),
        ("h100-80gb", "H100-80GB", 1),
        ("  RTX 4090   X 2 ", "RTX-4090", 2),
        ("rtx4090", "RTX-4090", 1),
        ("RTX-PRO x2", "RTX-PRO-6000", 2),
        ("A10", "A10", 1),  # a name comes before what begins with it
        ("A10x2", "A10", 2),
        ("H100-80GBx8", "H100-80GB", 8),
        ("RTX 4090x2", "RTX-4090", 2),
    ],
)
def test_cards_and_how_many(text, name, count):
    card, found = parse_cards(text)
    assert (card.name, found) == (name, count)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ("''", "H100-80GB x8")),
        ("H100", ("'H100'", "several", "H100-80GB, H100-PCIe,")),
        ("Voodoo 2", ("'Voodoo 2'", "not known", *CARDS)),
        ("H100-80GBxx8", ("'H100-80GBx'", "not known", "L4 x2")),
        ("L4 x0", ("0 cards", "1 to 1024")),
        ("L4 x-2", ("'L4 x-2'",)),
    ],
)
def test_cards_that_are_none(text, words):
    with refused("--fit", *words):
        parse_cards(text)


def test_the_knee_is_where_arithmetic_takes_as_long_as_reading():
    chip = CARDS["H100-80GB"].chip
    # Dense bf16: 2 bytes read and 2 operations per token for each parameter, so the size of the network does not count.
    expected = chip.flops * chip.flops_share / (chip.bandwidth * chip.bandwidth_share)
    for name in ("0.6B", "8B", "32B"):
        assert knee(share_of(qwen3(name), "bf16"), chip) == int(np.ceil(expected)) == 222
    assert knee(share_of(qwen3("8B"), "int8"), chip) == 111
    assert knee(share_of(qwen3("32B", 4), "bf16"), chip) == pytest.approx(222, abs=1)


def test_experts_make_it_later_if_they_are_routed():
    chip, sizes = CARDS["H100-80GB"].chip, qwen3("30B-A3B")
    dense = knee(share_of(sizes, "bf16", routed=False), chip)
    routed = knee(share_of(sizes, "bf16"), chip)
    assert dense == 222
    assert routed == pytest.approx(
        222 * (sizes.total - sizes.embedding) / (active_parameters(sizes) - sizes.embedding), rel=0.01
    )
    assert knee(share_of(qwen3("235B-A22B"), "bf16"), chip) > 2000
