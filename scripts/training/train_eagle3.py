"""Train an EAGLE-3 head (arXiv 2503.01840) for a target of your own, on text that the target generated.

    python scripts/training/train_eagle3.py init --target CHECKPOINT --out UNTRAINED
    python scripts/training/train_eagle3.py generate BUNDLE --prompts FILE --data SHARDS
    python scripts/training/train_eagle3.py train --target CHECKPOINT --data SHARDS --out HEAD --minutes 45
    python scripts/training/train_eagle3.py train --block 6 --start HEAD --target CHECKPOINT --data SHARDS --out DRAFTER
    python scripts/training/train_eagle3.py shrink HEAD --out SMALL_HEAD
    python scripts/training/train_eagle3.py ngrams --target CHECKPOINT --data SHARDS --out HEAD/ngrams.npz

``init`` is for a target that has no head yet: BUNDLE is built with what it writes, for the target's features. Progress
is saved every few minutes: HEAD can be used from the first save on, and --resume goes on from the last. With --block,
``train`` makes a block drafter (P-EAGLE), which drafts all depths in one pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.engine.llm import LLM
from echo_trt.engine.options import DEFAULTS, bounds, run_alone
from echo_trt.errors import UserError
from echo_trt.files.prompts import read_prompts
from echo_trt.models.block_weights import load_block
from echo_trt.models.checkpoint import Checkpoint, weights_sha256
from echo_trt.models.decoder import Decoder
from echo_trt.models.eagle3 import Eagle3Head
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.read_config import decoder_config
from echo_trt.models.weights import load_decoder, load_eagle3
from echo_trt_lab.ngram_tables import over, write_ngrams
from echo_trt_lab.training.answers import record, write_answers
from echo_trt_lab.training.corpus import Corpus, draft_vocabulary, features_path
from echo_trt_lab.training.features import missing_features, write_features
from echo_trt_lab.training.head import (
    block_config_of,
    feature_scale,
    head_config,
    save_head,
    start_from,
    warm_start,
    write_in_blocks,
)
from echo_trt_lab.training.loop import Trainer, TrainingRecipe, load_state
from echo_trt_lab.training.ngrams import count, held_out, read_texts, right

app = App(help_flags=["--help"], version_flags=[], default_parameter=DEFAULTS, help=__doc__.splitlines()[0])
console = Console()
DEFAULT = TrainingRecipe(minutes=45)
DRAFT_VOCAB = 8192


@app.command
def init(
    target: Annotated[Path, Parameter(help="the target's checkpoint: a Hugging Face folder or a .gguf file")],
    out: Annotated[Path, Parameter(help="folder for the head")],
) -> None:
    """Write a head that has learnt nothing, for the first bundle of a target that has none."""
    checkpoint = open_checkpoint(target)
    decoder = load_decoder(checkpoint, 1, torch.bfloat16)
    config = decoder.config
    ids = torch.arange(min(DRAFT_VOCAB, config.vocab_size))
    scale = torch.ones(3 * config.hidden_size)
    raw = head_config(config, len(ids), weights_sha256(checkpoint.path), config.intermediate_size)
    save_head(warm_start(raw, decoder, ids, scale, 1), scale, out)
    console.print(f"{out}: build a recipe with it as draft.source.path, then generate", highlight=False, soft_wrap=True)


@app.command
def generate(
    bundle: Annotated[Path, Parameter(help="the target's bundle; for a head, with an eagle3 draft of any quality")],
    prompts: Annotated[Path, Parameter(help="JSONL: id and prompt per line, in random order")],
    data: Annotated[Path, Parameter(help="folder for shard-*.npz; a later run goes on where this one ends")],
    batch: Annotated[int, Parameter(help="requests at once")] = 48,
    max_tokens: Annotated[int, Parameter(help="new tokens of an answer, at most")] = 224,
    per_shard: Annotated[int, Parameter(help="prompts of a file")] = 256,
) -> None:
    """Let the target answer prompts, greedily and sampled."""
    llm = LLM(bundle, batch=batch, prefix_cache=False)  # features of every prompt token are recorded
    with _progress("answers") as report:
        write_answers(llm, record(llm, bundle), read_prompts(prompts), data, max_tokens, per_shard, report)


@app.command
def train(
    target: Annotated[Path, Parameter(help="the target's checkpoint: a Hugging Face folder or a .gguf file")],
    data: Annotated[Path, Parameter(help="folder of shard-*.npz with text that the target generated")],
    out: Annotated[Path, Parameter(help="folder for the head and its training state")],
    minutes: Annotated[float, Parameter(help="training time, earlier runs included where it resumes")] = 45,
    resume: Annotated[bool, Parameter(help="go on from the last save in --out")] = False,
    start: Annotated[Path | None, Parameter(help="begin with this head, not with the target's last layer")] = None,
    draft_vocab: Annotated[
        int | None, Parameter(help="how many of the target's tokens the head can draft; 8192, or those of --start")
    ] = None,
    intermediate_size: Annotated[
        int | None,
        Parameter(validator=bounds(1), help="of the MLP; the target's, or that of --start, which it may exceed"),
    ] = None,
    block: Annotated[
        int | None,
        Parameter(validator=bounds(2), help="train a block drafter (P-EAGLE) of so many rows per pass"),
    ] = None,
    learning_rate: Annotated[float, Parameter(help="at its peak")] = DEFAULT.learning_rate,
    loss_rows: Annotated[int, Parameter(help="response tokens in a step, at least")] = DEFAULT.loss_rows,
    unroll_steps: Annotated[int, Parameter(help="length of a training chain")] = DEFAULT.unroll_steps,
    unroll_from: Annotated[float, Parameter(help="share of the time when chains begin")] = DEFAULT.unroll_from,
    max_length: Annotated[int, Parameter(help="leave out samples with more tokens")] = 2048,
    save_every: Annotated[float, Parameter(help="minutes between two saves")] = DEFAULT.save_every,
    seed: Annotated[int, Parameter(help="of the warm start")] = 0,
    fp32: Annotated[bool, Parameter(help="no bfloat16 in the head's arithmetic")] = False,
    device: Annotated[str, Parameter(help="cpu or cuda")] = "cpu",
) -> None:
    """Train a head, writing config.json and model.safetensors in Hugging Face's layout."""
    torch.manual_seed(seed)
    recipe = TrainingRecipe(
        minutes=minutes,
        learning_rate=learning_rate,
        loss_rows=loss_rows,
        unroll_steps=block or unroll_steps,
        unroll_from=0 if block else unroll_from,
        save_every=save_every,
        bf16=not fp32,
    )
    checkpoint = open_checkpoint(target)
    positions = max_length + recipe.unroll_steps
    decoder = load_decoder(checkpoint, positions, torch.bfloat16).to(device)
    _prepare_features(decoder, data)
    decoder.layers = decoder.layers[-1:]  # the others have had their say
    corpus = Corpus(data, max_length)
    size = f"{len(corpus.training):,} samples of {corpus.response_tokens:,} response tokens"
    console.print(f"{size}, and {len(corpus.held_out)} samples held out", highlight=False, soft_wrap=True)
    begins_with = start if start and not resume else None
    earlier = _read_head(begins_with, positions, decoder) if begins_with else None
    trainer = _trainer(checkpoint, decoder, corpus, recipe, out, draft_vocab, intermediate_size, earlier, resume, block)
    if earlier:
        start_from(trainer.head, earlier, trainer.scale)
    with _progress("training") as report:
        agreement = trainer.train(report)
    console.print(f"{out}: step {trainer.step}, held out: {agreement}", highlight=False, soft_wrap=True)


@app.command
def shrink(
    head: Annotated[Path, Parameter(help="a folder that train has written")],
    out: Annotated[Path, Parameter(help="folder for the smaller head")],
) -> None:
    """Write a head with its matrices in blocks of 4 bits, which the engine cpu takes as they are."""
    write_in_blocks(head, out)
    size = (out / "model.safetensors").stat().st_size / 1e6
    console.print(f"{out}: {size:.1f} MB", highlight=False, soft_wrap=True)


@app.command
def ngrams(
    target: Annotated[Path, Parameter(help="the target's checkpoint: a Hugging Face folder or a .gguf file")],
    data: Annotated[list[Path], Parameter(help="folder of shard-*.npz; give it again for more")],
    out: Annotated[Path, Parameter(help="the .npz, which a recipe names as draft.ngrams")],
    start: Annotated[Path | None, Parameter(help="an earlier .npz, for contexts of no answer")] = None,
) -> None:
    """Write down what the target usually says after a few tokens, for drafts to go on with."""
    checkpoint = open_checkpoint(target)
    vocab_size, sha256 = decoder_config(checkpoint.config, str(target)).vocab_size, weights_sha256(checkpoint.path)
    earlier = read_ngrams(start, sha256, vocab_size, "leave --start out") if start else None
    texts = read_texts(data, vocab_size)
    _make_folder(out.parent)
    counted, others = held_out(texts)
    reported, thought = right(over(count(counted), earlier), others)
    table = over(count(texts), earlier)
    write_ngrams(table, out, sha256)
    size = f"{len(table):,} n-grams of {sum(len(tokens) - prompt for tokens, prompt in texts):,} tokens"
    share = f"of held-out answers' tokens it names {reported:.1%}, and thinks {thought:.1%}"
    console.print(f"{out}: {size}, {out.stat().st_size / 1e6:.1f} MB; {share}", highlight=False, soft_wrap=True)


def _trainer(
    checkpoint: Checkpoint,
    target: Decoder,
    corpus: Corpus,
    recipe: TrainingRecipe,
    out: Path,
    draft_vocab: int | None,
    intermediate: int | None,
    earlier: Eagle3Head | None,
    resume: bool,
    block: int | None,
) -> Trainer:
    state = load_state(out) if resume else None
    if state:
        target_ids, scale = state["head"]["target_ids"], state["scale"]
    elif earlier and draft_vocab is None:  # another text's most frequent tokens would cost the head some of its own
        target_ids, scale = earlier.target_ids, feature_scale(corpus)
    else:
        size = min(draft_vocab or DRAFT_VOCAB, target.config.vocab_size)
        target_ids = draft_vocabulary(corpus, target.config.vocab_size, size, always=target.config.eos_token_ids)
        scale = feature_scale(corpus)
    if state:
        intermediate = state["head"]["mlp.down.weight"].shape[1]
    usual = (earlier or target).config.intermediate_size
    intermediate = intermediate or usual
    if earlier and intermediate < usual:
        raise UserError(f"--intermediate-size is {intermediate}, but --start has {usual}; give as many or more.")
    config = head_config(target.config, target_ids.numel(), weights_sha256(checkpoint.path), intermediate)
    config = block_config_of(config, block) if block else config
    positions = target.rotary.cos.shape[0]
    trainer = Trainer(warm_start(config, target, target_ids, scale, positions), target, scale, corpus, recipe, out)
    if state:
        trainer.resume(state)
    return trainer


def _read_head(folder: Path, positions: int, target: Decoder) -> Eagle3Head:
    checkpoint = open_checkpoint(folder)
    block = checkpoint.config.get("mask_token_id") is not None
    return (load_block if block else load_eagle3)(checkpoint, positions, target)


def _make_folder(folder: Path) -> None:
    """Before the work, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output folder {folder} cannot be made ({error.strerror}); name another one.") from error


def _prepare_features(target: Decoder, data: Path) -> None:
    missing = missing_features(data)
    if not missing:
        return
    with _progress("features") as report:
        for number, shard in enumerate(missing):
            report(number / len(missing), f"{features_path(shard).name}")
            write_features(target, shard)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[float, str], None]]:
    """Return a bar on a terminal, plain lines elsewhere."""
    if not sys.stdout.isatty():
        yield lambda share, text: print(f"{title} {share:6.1%} {text}", flush=True)
        return
    note = TextColumn("{task.fields[note]}")
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), note)
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=1.0, note="")
        yield lambda share, text: bar.update(task, completed=share, note=text)


if __name__ == "__main__":
    run_alone(app)
