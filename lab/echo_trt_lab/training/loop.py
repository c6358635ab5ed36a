"""The training loop: schedule, steps, validation, and a state on disk that a later run resumes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from echo_trt.errors import UserError
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt_lab.training.corpus import Batch, Corpus
from echo_trt_lab.training.head import output_rows, save_head
from echo_trt_lab.training.unroll import chain_loss, unroll


@dataclass(frozen=True)
class TrainingRecipe:
    minutes: float
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    loss_rows: int = 350
    warm_up: float = 0.02
    decay_from: float = 0.3
    unroll_steps: int = 4
    unroll_from: float = 0.45
    save_every: float = 4.0
    bf16: bool = True

    def rate(self, progress: float) -> float:
        """Warm-up, hold, linear decay to zero."""
        return self.learning_rate * min(1.0, progress / self.warm_up, max(0.0, 1 - progress) / (1 - self.decay_from))

    def steps(self, progress: float) -> int:
        """One step teaches most and costs least; from ``unroll_from`` on the head learns to live on its own output."""
        return self.unroll_steps if progress >= self.unroll_from else 1


@dataclass(frozen=True)
class Agreement:
    """On held-out text, by step of the chain."""

    top1: list[float]  # the head's best token is the target's best token
    accepted: float  # tokens per pass of a chain of all the steps on the text itself, the target's own one included

    def __str__(self) -> str:
        return f"top-1 {' '.join(f'{t:.3f}' for t in self.top1)}, accepted length {self.accepted:.3f}"


class Trainer:
    """``scale`` divides the features; ``report`` is told (progress, a line of text or nothing)."""

    def __init__(
        self, head: Eagle3Head, target: Decoder, scale: Tensor, corpus: Corpus, recipe: TrainingRecipe, out: Path
    ):
        self.device = target.embed.weight.device
        self.head, self.corpus, self.recipe, self.out = head.to(self.device), corpus, recipe, out
        self.scale, self.target = scale.to(self.device), target
        self.target_rows = output_rows(target, self.head.target_ids)
        trained = [p for p in head.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95), fused=True)
        self.trained, self.step, self.seconds, self.rows_seen = trained, 0, 0.0, 0

    @property
    def progress(self) -> float:
        return min(self.seconds / (60 * self.recipe.minutes), 1.0)

    def train(self, report: Callable[[float, str], None]) -> Agreement:
        batches = self.corpus.batches(self.recipe.loss_rows, seed=self.step)
        loss, saved = None, self.seconds
        while self.progress < 1:
            begin = time.perf_counter()
            now = self._train_step(self._to_device(next(batches)))
            loss = now if loss is None else 0.98 * loss + 0.02 * now
            self.seconds += time.perf_counter() - begin
            if self.step % 50 == 0:
                rate = self.recipe.rate(self.progress)
                report(self.progress, f"step {self.step} loss {loss:.3f} rate {rate:.1e} rows {self.rows_seen:,}")
            if self.seconds - saved > 60 * self.recipe.save_every:
                saved = self.seconds
                self.save()
                report(self.progress, f"step {self.step} held out: {self.validate(max_rows=4000)}")
        self.save()
        return self.validate()

    def _train_step(self, batch: Batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.progress)
        with self._precision():
            target = (batch.hidden.float() @ self.target_rows.T).float().softmax(dim=-1)
            loss = chain_loss(self.head, batch, self._scaled(batch), target, self.recipe.steps(self.progress))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.rows_seen += batch.rows.numel()
        return loss.item()

    @torch.no_grad()
    def validate(self, max_rows: int = 1 << 30) -> Agreement:
        """Held-out samples, first ones first, until ``max_rows`` rows are counted."""
        steps = self.recipe.unroll_steps
        hits, counts, accepted, chains = [0] * steps, [0] * steps, 0, 0
        for batch in self.corpus.pack(self.corpus.held_out, self.recipe.loss_rows):
            batch = self._to_device(batch)
            best = self._target_best(batch)
            whole = batch.reaches(steps - 1)  # chains that the text is long enough for
            alive = whole.clone()
            with self._precision():
                for step, logits in enumerate(unroll(self.head, batch, self._scaled(batch), steps)):
                    drafted = self.head.target_ids[logits.argmax(dim=-1)]
                    ahead = batch.reaches(step)
                    hits[step] += int(((drafted[: ahead.numel()] == best[step:]) & ahead).sum())
                    counts[step] += int(ahead.sum())
                    alive &= drafted[: whole.numel()] == batch.next_ids[step : step + whole.numel()]
                    accepted += int(alive.sum())
            chains += int(whole.sum())
            if counts[0] >= max_rows:
                break
        return Agreement([h / max(c, 1) for h, c in zip(hits, counts, strict=True)], 1 + accepted / max(chains, 1))

    def _target_best(self, batch: Batch) -> Tensor:
        matrix = (self.target.embed if self.target.lm_head is None else self.target.lm_head).weight
        return (batch.hidden.to(matrix.dtype) @ matrix.T).argmax(dim=-1)

    def _scaled(self, batch: Batch) -> Tensor:
        return batch.features.float() / self.scale

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.bf16)

    def _to_device(self, batch: Batch) -> Batch:
        return replace(batch, **{f.name: getattr(batch, f.name).to(self.device) for f in fields(batch)})

    def save(self) -> None:
        """Save the head as others load it, and the state to resume from, in ``training/``."""
        save_head(self.head, self.scale, self.out)
        state = {
            "head": {name: value for name, value in self.head.state_dict().items() if not name.startswith("embed.")},
            "optimizer": self.optimizer.state_dict(),
            "scale": self.scale,
            **{name: getattr(self, name) for name in ("step", "seconds", "rows_seen")},
        }
        path = state_path(self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def resume(self, state: dict) -> None:
        self.head.load_state_dict(state["head"], strict=False)
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "rows_seen"):
            setattr(self, name, state[name])


def state_path(out: Path) -> Path:
    return out / "training" / "state.pt"


def load_state(out: Path) -> dict:
    path = state_path(out)
    if not path.exists():
        raise UserError(f"{path} does not exist, so there is no training to resume; leave --resume out.")
    return torch.load(path, map_location="cpu", weights_only=True)
