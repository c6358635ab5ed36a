"""Networks that compute as always, while a synthetic text takes the place of what they choose and propose."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from echo_trt.bundle.manifest import Manifest
from echo_trt.engine.assemble import Networks
from echo_trt.engine.batch import InputBatch
from echo_trt.engine.drafters.eagle3 import Drafter
from echo_trt.engine.drafters.levels import LevelsDrafter
from echo_trt.engine.sampler import token_logprobs
from echo_trt.engine.tuning import USUAL_GATES
from echo_trt.speculation.drafts import Draft, Proposals
from echo_trt.speculation.goodput.model.acceptance import CALIBRATED_START, Acceptance
from echo_trt.speculation.pack import BLOCK, ForwardBatch
from echo_trt.speculation.sampling.draw import SamplingBatch, choose
from echo_trt.speculation.super_tree import SuperTree
from echo_trt_lab.synthetic_text import VARIABLE, Rates, synthetic_text


def text_keys(batch: InputBatch, slots: np.ndarray) -> np.ndarray:
    """Return the keys of the texts in ``slots`` [m], by prompt and seed: int64 [m]."""
    seeds = np.where(batch.sampling["temperature"][slots] > 0, batch.sampling["seed"][slots] & 0xFFFFFFFF, 0)
    prompts = (batch.tokens[slot, : batch.prompt_length[slot]] for slot in slots)
    return np.array([zlib.crc32(*each) for each in zip(prompts, seeds.tolist(), strict=True)], np.int64)


class SyntheticEngine:
    """A target whose choices are the text's; what they would have been is computed all the same."""

    def __init__(self, engine: Any, text: Any, batch: InputBatch):
        self.engine, self._text, self._batch = engine, text, batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def run(self, call: ForwardBatch, **inputs: Any) -> dict[str, Any]:
        outputs = self.engine.run(call, **inputs)
        if not len(call.slots):  # a measurement, of nobody's text
            return dict(outputs)
        rows = call.logit_rows
        keys = text_keys(self._batch, call.slots)[np.searchsorted(call.seq_begins, rows, "right") - 1]
        tokens = self._text.next_tokens(keys, call.token_ids[rows], call.positions[rows] + 1)
        return dict(outputs) | {"logits": SyntheticLogits(outputs["logits"], tokens)}

    launch = run  # a text is there before the device has ended


class SyntheticLogits:
    """A target's logits [n, V], here or on a device, of which ``tokens`` int64 [n] are chosen whatever they are.

    Where a grammar applies, the choice is the target's among the allowed tokens.
    """

    def __init__(self, logits: Any, tokens: np.ndarray):
        self._logits, self._tokens, self.shape = logits, tokens, logits.shape

    def __getitem__(self, index: Any) -> Any:
        return self._logits[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self._logits, dtype)

    def argmax(self, axis: int) -> np.ndarray:
        self._logits.argmax(axis)
        return self._tokens.copy()

    def choose(self, rows: np.ndarray, choice: SamplingBatch, *lineage: np.ndarray) -> np.ndarray:
        if isinstance(self._logits, np.ndarray):
            chosen = choose(self._logits[rows], choice)
        else:
            chosen = self._logits.choose(rows, choice, *lineage)
        return chosen if choice.masks is not None else self._tokens[rows]

    def log_probabilities(self, rows: np.ndarray, tokens: np.ndarray, top: int) -> tuple[np.ndarray, ...]:
        if not isinstance(self._logits, np.ndarray):
            return self._logits.log_probabilities(rows, tokens, top)
        found = token_logprobs(self._logits, rows, tokens, np.full(len(rows), top))
        best = np.array([entry.top for entry in found]).reshape(len(rows), top, 2)
        return np.array([entry.logprob for entry in found]), best[:, :, 1], best[:, :, 0].astype(np.int64)


class SyntheticDraft(Draft):
    """A draft whose proposals are replaced after they were computed; where there were none, there are none."""

    def __init__(self, draft: Draft, text: Any, keys: np.ndarray, batch: InputBatch, slots: np.ndarray):
        """``slots`` [B] of ``batch``, whose texts have ``keys``, are drafted for.

        A draft that looks ahead on a device has the same text there (``propose_on_device``).
        """
        self._draft, self._text, self.looks_ahead, self._keys = draft, text, draft.looks_ahead, keys
        self._lengths = batch.length[slots]
        self._roots = batch.tokens[slots, self._lengths - 1].astype(np.int64)

    def __getattr__(self, name: str) -> Any:  # what it took
        return getattr(self._draft, name)

    def look_ahead(self, depth: int, beams: int, width: int, maximum: int) -> None:
        self._draft.look_ahead(depth, beams, width, maximum)

    def expand_roots(self, requests: np.ndarray) -> Proposals:
        proposals, depth = self._draft.expand_roots(requests), np.zeros(len(requests), np.int64)
        return self._replaced(proposals, requests, self._roots[requests], depth)

    def expand(self, tree: SuperTree, nodes: np.ndarray) -> Proposals:
        proposals = self._draft.expand(tree, nodes)
        return self._replaced(proposals, tree.request[nodes], tree.token[nodes], tree.depth[nodes])

    def _replaced(self, proposals: Proposals, requests: np.ndarray, tokens: np.ndarray, depth: np.ndarray) -> Proposals:
        """Replace the proposals below ``tokens`` [F] at a ``depth`` [F]."""
        keys, positions = self._keys[requests], self._lengths[requests] + depth
        log_q, candidates = self._text.propose(keys, tokens, positions, depth + 1, proposals[0].shape[1])
        return np.where(proposals[0] > -np.inf, log_q, -np.inf).astype(np.float32), candidates


def propose(drafter: Any, text: Any) -> Any:
    """Let ``drafter`` propose the text. Returns it: it keeps its class, by which passes are measured and captured."""
    begin, batch, known = drafter.begin, drafter.batch, None
    if isinstance(drafter, LevelsDrafter):
        known = propose_on_device(drafter.engine, text)

    def begin_text(slots: np.ndarray) -> SyntheticDraft:
        keys = text_keys(batch, slots)
        if known is not None:
            known[batch.blocks.table[slots, batch.committed[slots] // BLOCK]] = keys
        return SyntheticDraft(begin(slots), text, keys, batch, slots)

    drafter.begin = begin_text
    return drafter


def propose_on_device(engine: Any, text: Any) -> np.ndarray:
    """Let a head on a device, a ``DeviceEngine``, draft levels of the text.

    Returns int64 [KV blocks], to be filled before a draft: the key of the text whose next KV row is in a block.
    """
    if (known := getattr(engine, "known_texts", None)) is not None:  # of another loop's drafter over the same engine
        return known
    import torch

    from echo_trt.backends.cuda.transfers import PACKED, send

    placed, kind = text.placed(torch, engine.device), type(engine)
    keys_there = torch.zeros(engine.num_blocks, dtype=torch.int64, device=engine.device)

    def proposed(keys: Any, tokens: Any, entries: Any, depth: Any, count: int) -> tuple[Any, Any]:
        positions = entries.long() + 2  # entries are numbered from the second token on
        scores, candidates = placed.propose(keys, tokens.long(), positions, depth, count)
        return scores.float(), candidates

    class SyntheticHead(kind):  # type: ignore[misc,valid-type]
        known_texts = np.zeros(engine.num_blocks, np.int64)
        _below: ForwardBatch | None = None

        def start_levels(self, call: ForwardBatch, below: ForwardBatch, *more: Any, **inputs: Any) -> Any:
            self._below = below
            return super().start_levels(call, below, *more, **inputs)

        def _outputs(self, call: ForwardBatch, inputs: Any) -> dict[str, Any]:
            outputs, below, self._below = super()._outputs(call, inputs), self._below, None
            if below is None:
                return dict(outputs)
            block = below.block_begins[:-1] + below.past_lens // BLOCK  # beyond the table where no level follows
            block = below.block_indices[np.minimum(block, len(below.block_indices) - 1)]
            rows = call.logit_rows
            sent = np.stack((block, self.known_texts[block], call.token_ids[rows], call.positions[rows]))
            blocks, keys, tokens, entries = send(sent.astype(np.int64), self.device)
            keys_there[blocks] = keys
            found = proposed(keys, tokens, entries, torch.ones_like(keys), outputs["scores"].shape[1])
            packed = torch.cat((found[0].contiguous().view(torch.int32), found[1].int()), dim=1)
            return dict(outputs) | {"scores": found[0], "candidates": found[1], PACKED: packed}

        def _level(self, tensors: dict[str, Any]) -> tuple[Any, ...]:
            scores, _, *rest = super()._level(tensors)
            past, tokens, table = tensors["past_lens"].long(), tensors["token_ids"], tensors["block_indices"]
            block = (tensors["block_begins"][:-1] + past // BLOCK).clip(max=len(table) - 1)
            beams = len(tokens) // len(past)
            keys, past = (
                each[:, None].expand(-1, beams).flatten() for each in (keys_there[table[block.long()].long()], past)
            )
            entries = tensors["positions"]
            return *proposed(keys, tokens, entries, entries.long() - past + 2, scores.shape[1]), *rest

    engine.__class__ = SyntheticHead
    vars(engine).pop("_levels", None)  # which knows the level of before
    return SyntheticHead.known_texts


class TrueChances:
    """Stands for a calibration: log q of a synthetic text says the chance truly. Gates are the usual ones."""

    def __init__(self, manifest: Manifest):
        self._depths, self.lookup = manifest.recipe.decoding.max_depth, manifest.recipe.draft.acceptance
        self.gates, self.sparse_gates, self.fixed_threshold = (), USUAL_GATES, max(USUAL_GATES.values())

    def model(self) -> Acceptance:
        return Acceptance.uncalibrated(self._depths, CALIBRATED_START)


@dataclass(frozen=True)
class SyntheticNetworks(Networks):
    """A bundle's engines, of which ``text`` is what they say. ``target`` is a SyntheticEngine."""

    text: Any = None

    @cached_property
    def drafter(self) -> Drafter | None:
        drafter: Drafter | None = propose(super().drafter, self.text)
        return drafter

    def over(self, batch: InputBatch) -> SyntheticNetworks:
        return replace(self, batch=batch, target=SyntheticEngine(self.target.engine, self.text, batch))


def wrapped(networks: Networks, folder: Path, note: Callable[[str], None]) -> Networks:
    """Return networks that say a synthetic text, where the environment has its rates. Raises UserError."""
    if not (given := os.environ.get(VARIABLE)):
        return networks
    rates = Rates.parse(given)
    note(rates.sentence)
    text = synthetic_text(folder, networks.manifest, rates)
    parts = {field.name: getattr(networks, field.name) for field in fields(networks)}
    parts["target"] = SyntheticEngine(networks.target, text, networks.batch)
    return SyntheticNetworks(**parts | {"calibration": TrueChances(networks.manifest)}, text=text)


@contextmanager
def rates_given(rates: str | None) -> Iterator[None]:
    """Let bundles that are opened meanwhile say a synthetic text; None: as the environment says."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = rates or before or ""
    try:
        yield
    finally:
        os.environ[VARIABLE] = before or ""
