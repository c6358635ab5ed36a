"""Text that the target generated, as shards on disk, and the packed batches that training takes from it.

A shard is ``shard-00000.npz``: ``tokens`` int32 (prompt and response of all its samples, end to end), ``lengths`` and
``prompt_lengths`` int32, one per sample. Beside it lies ``shard-00000.features.npy``, see ``features``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from echo_trt.errors import UserError

HELD_OUT_EVERY = 50  # one sample in so many is never trained on; by its number, so that new shards move none


@dataclass(frozen=True)
class Sample:
    shard: int
    start: int
    length: int
    prompt_length: int

    @property
    def entries(self) -> int:
        """Entry j pairs token j+1 with feature j and predicts token j+2, which must exist."""
        return self.length - 2

    @property
    def loss_begin(self) -> int:
        """The first entry that decoding asks the head for: it holds the response's first token."""
        return self.prompt_length - 1


@dataclass(frozen=True)
class Batch:
    """Entries of several samples, packed. The R loss rows are those that predict a token of a response."""

    token_ids: Tensor  # [N] token j+1
    features: Tensor  # [N, 3H] the target's, of position j
    positions: Tensor  # [N] j
    sequence: Tensor  # [N] which sample an entry belongs to
    rows: Tensor  # [R] loss rows among the entries
    hidden: Tensor  # [R, H] the target's normed last state at j+1, from which it predicts token j+2
    next_ids: Tensor  # [R] token j+2 of the text

    def reaches(self, step: int) -> Tensor:
        """[R - step] whether the row ``step`` further on belongs to the same sample."""
        mine = self.sequence[self.rows]
        return mine[step:] == mine[: mine.numel() - step]


def write_shard(path: Path, samples: Sequence[tuple[np.ndarray, int, np.ndarray]]) -> None:
    """Write (tokens [L], prompt length, known uint16 [L, 4H]) of each sample; ``path`` appears last, and whole."""
    tokens, prompts, known = zip(*samples, strict=True)
    lengths = np.array([len(t) for t in tokens], np.int32)
    _write_whole(features_path(path), lambda stream: np.save(stream, np.concatenate(known)))
    columns = {"tokens": np.concatenate(tokens), "lengths": lengths, "prompt_lengths": np.array(prompts, np.int32)}
    _write_whole(path, lambda stream: np.savez(stream, **columns))


def _write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    partial = path.with_name("partial-" + path.name)
    with partial.open("wb") as stream:
        write(stream)
    os.replace(partial, path)


def shard_paths(folder: Path) -> list[Path]:
    paths = sorted(folder.glob("shard-*.npz"))
    if not paths:
        raise UserError(f"data folder {folder} holds no shard-*.npz; generate text with the target first.")
    return paths


def features_path(shard: Path) -> Path:
    return shard.with_suffix(".features.npy")


class Corpus:
    """Every sample of a folder, features memory-mapped, a fiftieth of the samples held out."""

    def __init__(self, folder: Path, max_length: int):
        self.tokens: list[np.ndarray] = []
        self.features: list[np.ndarray] = []
        samples: list[Sample] = []
        for number, path in enumerate(shard_paths(folder)):
            with np.load(path) as shard:
                lengths, prompts = shard["lengths"].tolist(), shard["prompt_lengths"].tolist()
                self.tokens.append(shard["tokens"].astype(np.int64))
            self.features.append(np.load(features_path(path), mmap_mode="r"))
            starts = np.cumsum([0, *lengths[:-1]]).tolist()
            samples += [Sample(number, *s) for s in zip(starts, lengths, prompts, strict=True)]
        fits = [(i, s) for i, s in enumerate(samples) if s.loss_begin < s.entries and s.length <= max_length]
        self.training = [s for i, s in fits if i % HELD_OUT_EVERY]
        self.held_out = [s for i, s in fits if i % HELD_OUT_EVERY == 0]
        if not self.training or not self.held_out:
            raise UserError(
                f"data folder {folder} holds {len(fits)} usable samples; generate {HELD_OUT_EVERY} or more."
            )

    @property
    def response_tokens(self) -> int:
        return sum(s.entries - s.loss_begin for s in self.training)

    def text(self, sample: Sample) -> np.ndarray:
        return self.tokens[sample.shard][sample.start : sample.start + sample.length]

    def known(self, sample: Sample) -> Tensor:
        """Return what the target computed over a sample: bfloat16 [length, 3H of features + H of last state]."""
        stored = self.features[sample.shard][sample.start : sample.start + sample.length]
        return torch.from_numpy(np.array(stored)).view(torch.bfloat16)

    def batches(self, loss_rows: int, seed: int) -> Iterator[Batch]:
        """Training samples in random order, for ever, packed into batches of at least ``loss_rows`` loss rows."""
        generator = np.random.default_rng(seed)
        while True:
            order = generator.permutation(len(self.training))
            yield from self.pack([self.training[i] for i in order], loss_rows)

    def pack(self, samples: Sequence[Sample], loss_rows: int) -> Iterator[Batch]:
        chosen, rows = [], 0
        for sample in samples:
            chosen.append(sample)
            rows += sample.entries - sample.loss_begin
            if rows >= loss_rows:
                yield self._batch(chosen)
                chosen, rows = [], 0
        if chosen:
            yield self._batch(chosen)

    def _batch(self, samples: Sequence[Sample]) -> Batch:
        texts = [torch.from_numpy(self.text(s)) for s in samples]
        known = [self.known(s) for s in samples]
        width = known[0].shape[1] // 4
        begins = np.cumsum([0, *(s.entries for s in samples[:-1])]).tolist()
        spans = [(b + s.loss_begin, b + s.entries) for b, s in zip(begins, samples, strict=True)]
        return Batch(
            token_ids=torch.cat([text[1:-1] for text in texts]),
            features=torch.cat([k[:-2, : 3 * width] for k in known]),
            positions=torch.cat([torch.arange(s.entries) for s in samples]),
            sequence=torch.cat([torch.full((s.entries,), i) for i, s in enumerate(samples)]),
            rows=torch.cat([torch.arange(*span) for span in spans]),
            hidden=torch.cat([k[s.prompt_length : -1, 3 * width :] for k, s in zip(known, samples, strict=True)]),
            next_ids=torch.cat([text[s.prompt_length + 1 :] for text, s in zip(texts, samples, strict=True)]),
        )


def draft_vocabulary(corpus: Corpus, vocab_size: int, draft_size: int, always: Sequence[int]) -> Tensor:
    """Return the ``draft_size`` most frequent ids of the training text, ascending, with those of ``always`` among
    them.
    """
    counts = np.zeros(vocab_size)
    for sample in corpus.training:
        np.add.at(counts, corpus.text(sample), 1.0)
    # BPE ids are in the order of the merges, so a low id is a likelier unseen token than a high one.
    counts += 1.0 / (1.0 + np.arange(vocab_size) / 1000.0)
    counts[list(always)] = np.inf
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:draft_size]))
