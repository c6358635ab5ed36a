"""The source of copies: prompt lookup, beside whatever drafts."""

from __future__ import annotations

from echo_trt.engine.assemble import Networks
from echo_trt.engine.drafters.lookup import LookupDrafter
from echo_trt.speculation.chains import Chains
from echo_trt.speculation.goodput.model.acceptance import Acceptance
from echo_trt.speculation.goodput.settings import GoodputSettings
from echo_trt.speculation.planner import ChainSource, StepContext


class LookupSource(ChainSource):
    """Copies up to ``length`` tokens below a root."""

    def __init__(self, lookup: LookupDrafter, length: int):
        self._lookup, self._length = lookup, length

    def propose(self, load: StepContext) -> Chains:
        return self._lookup.chains(load.slots, self._length)


def copies(networks: Networks, settings: GoodputSettings, acceptance: Acceptance) -> ChainSource | None:
    """Make the source of a bundle; None: its recipe leaves copies out."""
    return LookupSource(networks.copier, settings.max_depth) if networks.copier else None
