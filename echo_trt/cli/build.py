"""``echo-trt build``: a recipe to a bundle, checked against the reference before it is put in its place."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from echo_trt import __version__
from echo_trt.backends.kind import Detail, engine_kind, engine_kinds
from echo_trt.backends.self_check import block_shape, check_compiled, worst
from echo_trt.bundle.calibration import Calibration, read_calibration
from echo_trt.bundle.card import write_config
from echo_trt.bundle.manifest import (
    CONFIDENCE,
    MANIFEST,
    NGRAMS,
    BlockFacts,
    Manifest,
    NetworkFacts,
    SelfCheck,
    sha256,
)
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.bundle.recipe import Precision, Recipe, Sampling, Source
from echo_trt.bundle.sources import locate
from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt.engine.params import MAX_STOP_TOKENS
from echo_trt.errors import UserError, first_mistake
from echo_trt.files.extras import extra
from echo_trt.models.block_weights import check_block, confidence_by_token, load_block
from echo_trt.models.checkpoint import Checkpoint, read_json, weights_sha256
from echo_trt.models.config import BlockConfig, DecoderConfig
from echo_trt.models.decoder import Decoder
from echo_trt.models.families import FAMILIES
from echo_trt.models.fp8_checkpoint import Fp8Checkpoint
from echo_trt.models.fp8_linear import E4M3
from echo_trt.models.hybrid_config import HybridConfig
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.open_tokenizer import check_same_tokens, read_template, read_tokenizer
from echo_trt.models.ranks import Shard
from echo_trt.models.read_config import check_context, decoder_config
from echo_trt.models.roles import BlockModule, DraftModule, HeadModule, MtpModule, Role, TargetModule
from echo_trt.models.weights import TYPES, load_decoder, load_eagle3, load_mtp
from echo_trt.sizing.needs import check_space
from echo_trt.sizing.networks import decoder_sizes
from echo_trt.speculation.paths import MAX_ROWS
from echo_trt.speculation.policies import reserve_for

TOOLS = ("transformers", "tokenizers", "numpy")  # of every engine, beside its own
Progress = Callable[[str], None]


def build(
    recipe: Recipe,
    recipe_folder: Path,
    out: Path,
    progress: Progress = lambda stage: None,
    detail: Detail = lambda share, phase: None,
) -> Manifest:
    """Compile a recipe's networks into the bundle ``out``, which appears whole or not at all.

    A bundle that is there before is replaced, with the calibration and the costs that were written into it.

    ``progress`` is told each stage, ``detail`` how far a stage is, where its compiler says so.
    """
    _check_settings(recipe)
    out = out.resolve()  # a link's folder is replaced, not the link, and so is the one that this runs in
    work = _work_folder(out)
    old = work.with_name(f"{work.name.removesuffix('-new')}-old")
    try:
        for name in engine_kind(recipe.engine).kept:
            if (out / name).exists():
                shutil.copy(out / name, work)
        manifest = _build_into(recipe, recipe_folder, work, progress, detail)
        (work / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n", encoding="utf-8")
        work.chmod(0o755)
        if out.exists():
            out.rename(old)
        work.rename(out)
    finally:
        for folder in (work, old):
            shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _work_folder(out: Path) -> Path:
    """Return a new folder beside ``out``, which the bundle can take the place of."""
    try:
        if out.exists() and not (out / MANIFEST).exists() and any(out.iterdir() if out.is_dir() else [out]):
            raise UserError(f"output {out} exists and is not a bundle; name another folder with -o.")
        out.parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix="-new", dir=out.parent))
    except OSError as error:
        raise UserError(f"output {out} cannot be made ({error.strerror}); name another folder with -o.") from error


def _check_settings(recipe: Recipe) -> None:
    kind = engine_kind(recipe.engine)
    if recipe.tensor_parallel > 1 and not kind.divides:
        raise UserError(
            f"tensor_parallel is {recipe.tensor_parallel}, but {recipe.engine} runs on one device; set it to 1, or use "
            f"--engine {_names('divides')}."
        )
    for key, precision in (("precision", recipe.precision), ("draft.precision", recipe.draft.precision)):
        if precision is not None and precision not in kind.precisions:
            have = ", ".join(kind.precisions)
            raise UserError(f"{key} is {precision!r}, which {recipe.engine} does not have; use one of {have}.")
    kind.check(recipe)


def _names(trait: str) -> str:
    """List the engines that have a trait, such as ``divides``."""
    return " or ".join(kind.name for kind in engine_kinds() if getattr(kind, trait))


def _build_into(recipe: Recipe, recipe_folder: Path, work: Path, progress: Progress, detail: Detail) -> Manifest:
    progress("reading the target")
    checkpoint = _open(recipe.target, recipe_folder)
    _check_fp8("precision", recipe.precision, checkpoint)
    positions = recipe.limits.context + reserve_for(recipe.decoding.model_dump())
    ranks = recipe.tensor_parallel
    config = decoder_config(checkpoint.config, str(checkpoint.path))
    check_context(config, recipe.limits.context)
    if recipe.draft.kind == "block":
        _check_block(recipe, recipe_folder, config)
    if ranks > 1:
        check_space(recipe, recipe_folder, work)
    dtype = _loaded_type(recipe, recipe.precision)
    if isinstance(decoder_config(checkpoint.config, str(checkpoint.path)), HybridConfig):
        _check_hybrid(recipe)
    target = load_decoder(checkpoint, positions, dtype, Shard(0, ranks))
    digest = weights_sha256(checkpoint.path)
    tokenizer = read_tokenizer(checkpoint, recipe.target.tokenizer and recipe_folder / recipe.target.tokenizer)
    if recipe.target.chat_template is not None:
        tokenizer.chat_template = read_template(recipe_folder / recipe.target.chat_template)
    draft, feature_layers, draft_digest = _draft_role(recipe, recipe_folder, work, target, digest, tokenizer, progress)
    calibration = _calibration(recipe, recipe_folder, digest, draft_digest)
    if recipe.draft.ngrams is not None:
        ngrams = recipe_folder / recipe.draft.ngrams
        read_ngrams(ngrams, digest, config.vocab_size)  # if they are refused, then before the hours of compiling
        shutil.copyfile(ngrams, work / NGRAMS)

    compile_as, engine_facts = engine_kind(recipe.engine).compiler(recipe, work, detail)
    checks: dict[str, SelfCheck | None] = {}
    facts: dict[str, NetworkFacts] = {}
    role, files = TargetModule(target, feature_layers), []
    del target
    for rank in range(ranks):
        which = f"target, rank {rank} of {ranks}" if ranks > 1 else "target"
        if rank:
            progress(f"reading the {which}")
            del role  # before the next: the host has room for one rank's weights
            role = TargetModule(load_decoder(checkpoint, positions, dtype, Shard(rank, ranks)), feature_layers)
        progress(f"compiling the {which}")
        name = f"target.rank{rank}" if ranks > 1 else "target"
        compiled = compile_as(role, name, recipe.precision)
        files.append(compiled.file)
        checks["target"] = worst(checks.get("target"), check_compiled(role, compiled, recipe.precision))
    facts["target"] = _facts(role, files)
    if ranks > 1:
        facts["target"].parameters = decoder_sizes(config).total
    if draft is not None:
        progress("compiling the draft")
        compiled = compile_as(draft, "draft", recipe.draft_precision)
        checks["draft"] = check_compiled(draft, compiled, recipe.draft_precision)
        facts["draft"] = _facts(draft, [compiled.file])
    progress("writing the bundle")
    tokenizer.save_pretrained(work)
    eos = _eos(checkpoint, config, tokenizer)
    write_config(work, eos, recipe.limits.context, config.vocab_size)
    if calibration is not None:
        write(work, CALIBRATION, calibration)
    files = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file() and p.name != CALIBRATION)
    return Manifest(
        name=recipe.name,
        engine=recipe.engine,
        precision=recipe.precision,
        recipe=recipe,
        target=facts["target"],
        draft=facts.get("draft"),
        eos_token_ids=eos,
        sampling=_sampling(checkpoint, config, recipe.sampling),
        target_sha256=digest,
        draft_sha256=draft_digest,
        tokenizer=tokenizer.name_or_path if recipe.target.random_weights else "",
        engine_facts=engine_facts,
        checks={name: check for name, check in checks.items() if check is not None},
        tools={
            "echo-trt": __version__,
            "python": platform.python_version(),
            **{t: importlib.metadata.version(t) for t in (*engine_kind(recipe.engine).tools, *TOOLS)},
        },
        files={name: sha256(work / name) for name in files},
    )


def _open(source: Source, recipe_folder: Path, draft: str = "") -> Checkpoint:
    """Open the checkpoint of a target or of a draft of the kind ``draft``, or one of its shape."""
    if source.random_weights:
        checkpoint: Checkpoint = extra("build", "random_checkpoint")(source, recipe_folder, draft)
        return checkpoint
    return open_checkpoint(locate(source, recipe_folder))


def _loaded_type(recipe: Recipe, precision: Precision) -> torch.dtype | None:
    """Return the dtype in which weights are loaded for a build; None: the checkpoint's own dtype."""
    if precision == "fp8":
        return E4M3
    # A divided network is too large to be read in more than it is built in, where the checkpoint has more.
    return None if recipe.tensor_parallel == 1 else TYPES[precision]


def _check_fp8(key: str, precision: Precision, checkpoint: Checkpoint) -> None:
    if precision == "fp8" and not isinstance(checkpoint, Fp8Checkpoint):
        raise UserError(f"{key} is 'fp8', but {checkpoint.path} has no FP8 weights; use bf16, or an FP8 checkpoint.")


def _check_block(recipe: Recipe, recipe_folder: Path, target: DecoderConfig) -> None:
    """Refuse a block drafter of another target, or one whose rows have no room, before any weights are read."""
    checkpoint = _open(recipe.draft.source, recipe_folder, "block")
    config = check_block(checkpoint, target, recipe.draft.block)
    appended, reserve = block_shape(config).appended, reserve_for(recipe.decoding.model_dump())
    if appended >= reserve:
        raise UserError(
            f"{checkpoint.path}: a block of {config.block_size} rows takes {appended} KV rows of a request, and "
            f"{reserve} are kept ready; set decoding.per_request to {appended + 1} or more, or lower draft.block."
        )


def _check_hybrid(recipe: Recipe) -> None:
    """Refuse what a target with delta-net layers does not have."""
    if not engine_kind(recipe.engine).states:
        raise UserError(
            f"engine is {recipe.engine}, but a target with delta-net layers runs on {_names('states')} alone; use that."
        )
    if recipe.precision not in ("fp32", "bf16", "fp16"):
        raise UserError(
            f"precision is {recipe.precision}, but a target with delta-net layers is built in fp32 or bf16 so far; use "
            "one of these."
        )
    if recipe.tensor_parallel > 1:
        raise UserError(
            f"tensor_parallel is {recipe.tensor_parallel}, but a target with delta-net layers is not divided; set it "
            "to 1."
        )
    tree = max(recipe.decoding.per_request, recipe.decoding.static.tokens)
    if tree > MAX_ROWS:
        raise UserError(
            f"decoding.per_request or static.tokens is {tree}, but a target with delta-net layers verifies {MAX_ROWS} "
            "tokens of a request at most; lower it."
        )


def _calibration(recipe: Recipe, recipe_folder: Path, digest: str, draft_digest: str) -> Calibration | None:
    if recipe.calibration is None:
        return None
    try:
        return read_calibration(recipe_folder / recipe.calibration, digest, draft_digest)
    except UserError as error:
        raise UserError(f"the recipe's calibration: {error}") from error


def _draft_role(recipe, recipe_folder, work: Path, target: Decoder, digest: str, tokenizer, progress: Progress):
    """Return the draft's role, None without a network; the target's layers whose inputs it reads; its weights' hash."""
    draft = recipe.draft
    if draft.kind == "mtp":
        progress("reading the draft")
        checkpoint, dtype = _open(recipe.target, recipe_folder), _loaded_type(recipe, recipe.draft_precision)
        head = load_mtp(checkpoint, target.rotary.cos.shape[0], target, dtype)
        return MtpModule(head, draft.top_k), (target.config.num_layers,), digest
    if draft.source is None:
        return None, (), ""
    progress("reading the draft")
    checkpoint = _open(draft.source, recipe_folder, draft.kind)
    positions, own_digest = target.rotary.cos.shape[0], weights_sha256(checkpoint.path)
    dtype = _loaded_type(recipe, recipe.draft_precision)
    _check_fp8("draft.precision", recipe.draft_precision, checkpoint)
    if draft.kind == "model":
        where = str(checkpoint.path)
        folder = draft.source.tokenizer and recipe_folder / draft.source.tokenizer
        check_same_tokens(tokenizer, read_tokenizer(checkpoint, folder), where)
        decoder, maximum = load_decoder(checkpoint, positions, dtype), target.config.vocab_size
        if isinstance(decoder.config, HybridConfig):
            raise UserError(
                f"{where} has delta-net layers, which no draft model may have; use draft.kind mtp or lookup."
            )
        if decoder.config.vocab_size > maximum:  # its padding would be proposed as tokens that the target cannot read
            raise UserError(
                f"{where}: vocab_size is {decoder.config.vocab_size}, but the target's is {maximum}; "
                "use a draft with at most as many."
            )
        return DraftModule(decoder, draft.top_k), (), own_digest
    if draft.kind == "block":
        drafter = load_block(checkpoint, positions, target, dtype or torch.float32, draft.block)
        if drafter.config.confidence:
            np.save(work / CONFIDENCE, confidence_by_token(drafter, checkpoint))
        return BlockModule(drafter, draft.top_k), drafter.config.feature_layers, own_digest
    head = load_eagle3(checkpoint, positions, target, dtype)
    if head.config.target_sha256 and head.config.target_sha256 != digest:
        raise UserError(
            f"{checkpoint.path}: target_sha256 says that this head is for other weights than the recipe's target; "
            "train one with scripts/training/train_eagle3.py, or use the target it belongs to."
        )
    return HeadModule(head, draft.top_k), head.config.feature_layers or target.config.feature_layers, own_digest


def _facts(role: Role, files: list[str]) -> NetworkFacts:
    config = role.network.config
    return NetworkFacts(
        file=files[0],
        rank_files=files if len(files) > 1 else [],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=role.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        parameters=sum(p.numel() for p in role.parameters()),
        feature_size=config.feature_size if isinstance(role, (HeadModule, BlockModule)) else 0,
        block=block_facts(config) if isinstance(role, BlockModule) else None,
        state_values=sum(math.prod(shape) for shape in getattr(role, "states", {}).values()),
    )


def block_facts(config: BlockConfig) -> BlockFacts:
    """State how a drafter's pass looks, for a runtime without PyTorch."""
    shape = block_shape(config)
    return BlockFacts(
        rows=shape.rows,
        mask_token=shape.mask_token,
        both_ways=shape.both_ways,
        anchored=shape.anchored,
        predicts_next=config.predicts_next,
        confidence=config.confidence,
    )


def _eos(checkpoint: Checkpoint, config: DecoderConfig, tokenizer) -> list[int]:
    """Return the end tokens of the configuration, the tokenizer and the family, which may differ."""
    turn = tokenizer.backend_tokenizer.token_to_id(FAMILIES[config.family].end_of_turn)
    ids = [*config.eos_token_ids, tokenizer.eos_token_id, turn]
    generation = checkpoint.path / "generation_config.json"  # where Qwen3 names its second end token
    if generation.exists():
        stated = read_json(generation).get("eos_token_id")
        ids += stated if isinstance(stated, list) else [stated]
    # One that is no token of the target's, such as -1 for none, is never written.
    ends = sorted({int(i) for i in ids if i is not None and 0 <= int(i) < config.vocab_size})
    if len(ends) > MAX_STOP_TOKENS:
        raise UserError(
            f"{checkpoint.path} names {len(ends)} end tokens (eos_token_id in config.json, generation_config.json and "
            f"the tokenizer), but a request stops at {MAX_STOP_TOKENS} at most; leave the others out there."
        )
    return ends


def _sampling(checkpoint: Checkpoint, config: DecoderConfig, preferred: Sampling) -> Sampling:
    """Return what requests that say nothing get: what the recipe prefers, else what a checkpoint that samples
    recommends, of GGUF else its family."""
    path, stated = checkpoint.path / "generation_config.json", {}
    if checkpoint.path.is_file():
        path, stated = checkpoint.path, {**FAMILIES[config.family].sampling, **checkpoint.config["generation_config"]}
    elif path.exists() and (written := read_json(path)).get("do_sample"):
        stated = written
    named = {name: stated[name] for name in Sampling.model_fields if stated.get(name) is not None}
    try:
        return Sampling.model_validate(named | preferred.given(), strict=False)
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; mend it, or set do_sample to false.") from None
