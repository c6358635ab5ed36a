"""``echo-trt build``: a recipe to a bundle, checked against the reference before it is put in its place."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from echo_trt import __version__
from echo_trt.backends.kind import Detail, engine_kind
from echo_trt.backends.self_check import check_compiled
from echo_trt.bundle.calibration import Calibration, read_calibration
from echo_trt.bundle.card import write_config
from echo_trt.bundle.manifest import MANIFEST, NGRAMS, Manifest, NetworkFacts, SelfCheck, sha256
from echo_trt.bundle.ngrams import read_ngrams
from echo_trt.bundle.recipe import Precision, Recipe, Source
from echo_trt.bundle.sources import locate
from echo_trt.bundle.stored import CALIBRATION, write
from echo_trt.cli.build_checks import check_engine, check_fp8, check_settings
from echo_trt.cli.stated import end_tokens, recommended_sampling
from echo_trt.engine.drafters.kind import DraftSource, draft_kind
from echo_trt.errors import UserError
from echo_trt.files.extras import of_lab
from echo_trt.models.checkpoint import Checkpoint, weights_sha256
from echo_trt.models.config import DecoderConfig
from echo_trt.models.fp8_linear import E4M3
from echo_trt.models.open_checkpoint import open_checkpoint
from echo_trt.models.open_tokenizer import read_template, read_tokenizer
from echo_trt.models.ranks import Shard
from echo_trt.models.read_config import check_context, decoder_config
from echo_trt.models.roles import Role, TargetModule, feature_size, project_in_target
from echo_trt.models.weights import TYPES, load_decoder
from echo_trt.sizing.needs import check_space
from echo_trt.sizing.networks import decoder_sizes
from echo_trt.sizing.shapes import config_of
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
    check_settings(recipe, engine_kind(recipe.engine))
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


def _build_into(recipe: Recipe, recipe_folder: Path, work: Path, progress: Progress, detail: Detail) -> Manifest:
    """Open and check what the recipe names, load it, compile it into ``work``, and state what there is."""
    progress("reading the target")
    opened = _opened(recipe, recipe_folder, work)
    loaded = _loaded(opened, work, progress)
    compiled = _compiled(opened, loaded, work, progress, detail)
    progress("writing the bundle")
    return _written(opened, loaded, compiled, work)


@dataclass(frozen=True)
class _OpenedPair:
    """A recipe's checkpoints, before any weights are read; ``draft`` is None without a network."""

    recipe: Recipe
    folder: Path
    target: Checkpoint
    config: DecoderConfig
    draft: Checkpoint | None

    @property
    def positions(self) -> int:
        return self.recipe.limits.context + reserve_for(self.recipe.decoding.model_dump())

    def role(self, rank: int, feature_layers: tuple[int, ...]) -> TargetModule:
        """Load a rank of the target."""
        dtype, shard = _loaded_type(self.recipe, self.recipe.precision), Shard(rank, self.recipe.tensor_parallel)
        in_blocks = self.recipe.precision in engine_kind(self.recipe.engine).blocks
        return TargetModule(load_decoder(self.target, self.positions, dtype, shard, in_blocks), feature_layers)


def _opened(recipe: Recipe, folder: Path, work: Path) -> _OpenedPair:
    """Open the checkpoints, and refuse what cannot be built of them."""
    kind, source, draft = draft_kind(recipe.draft.kind), recipe.draft.source, None
    if kind.network and source:  # first, since a target is fetched for many minutes
        draft = _open(source, folder, kind.name)
        kind.config(draft.config, str(draft.path), recipe, decoder_config(*config_of(recipe.target, folder)))
    target = _open(recipe.target, folder)
    check_fp8("precision", recipe.precision, target)
    config = decoder_config(target.config, str(target.path))
    check_context(config, recipe.limits.context)
    if kind.network:
        draft = draft or target
        kind.check(draft, recipe, config)
        check_fp8("draft.precision", recipe.draft_precision, draft)
    if recipe.tensor_parallel > 1:
        check_space(recipe, folder, work)
    check_engine(recipe, config, engine_kind(recipe.engine))
    return _OpenedPair(recipe, folder, target, config, draft)


@dataclass
class _LoadedPair:
    """What compiling begins with: the first rank's ``target``, and the draft's role, which share an embedding.

    digest, draft_digest  SHA-256 of their weights; the latter is "" without a network
    """

    target: TargetModule | None
    draft: Role | None
    tokenizer: Any
    digest: str
    draft_digest: str
    calibration: Calibration | None


def _loaded(opened: _OpenedPair, work: Path, progress: Progress) -> _LoadedPair:
    """Load the networks, and what belongs to their weights: if that is refused, then before the hours of compiling."""
    recipe, folder, digest = opened.recipe, opened.folder, weights_sha256(opened.target.path)
    target = opened.role(0, ())
    tokenizer = read_tokenizer(opened.target, recipe.target.tokenizer and folder / recipe.target.tokenizer)
    if recipe.target.chat_template is not None:
        tokenizer.chat_template = read_template(folder / recipe.target.chat_template)
    draft, draft_digest = None, ""
    if opened.draft is not None:
        progress("reading the draft")
        dtype = _loaded_type(recipe, recipe.draft_precision)
        source = DraftSource(
            recipe, folder, work, opened.draft, dtype, opened.positions, target.network, digest, tokenizer
        )
        draft, layers = draft_kind(recipe.draft.kind).load(source)
        target = TargetModule(target.network, layers)
        draft_digest = digest if opened.draft is opened.target else weights_sha256(opened.draft.path)
    calibration = _calibration(recipe, folder, digest, draft_digest)
    if recipe.draft.ngrams is not None:
        ngrams = folder / recipe.draft.ngrams
        read_ngrams(ngrams, digest, opened.config.vocab_size)
        shutil.copyfile(ngrams, work / NGRAMS)
    return _LoadedPair(target, draft, tokenizer, digest, draft_digest, calibration)


def _compiled(
    opened: _OpenedPair, loaded: _LoadedPair, work: Path, progress: Progress, detail: Detail
) -> dict[str, Any]:
    """Compile the target, rank by rank, and the draft; returns what the manifest states of it."""
    recipe, ranks = opened.recipe, opened.recipe.tensor_parallel
    compile_as, engine_facts = engine_kind(recipe.engine).compiler(recipe, work, detail)
    files: list[str] = []
    found: list[SelfCheck | None] = []
    role, loaded.target = loaded.target, None
    layers, card = role.feature_layers, engine_kind(recipe.engine).card
    in_target = card is not None and card.projects_features == "target"
    for rank in range(ranks):
        which = f"target, rank {rank} of {ranks}" if ranks > 1 else "target"
        if rank:
            progress(f"reading the {which}")
            del role  # before the next: the host has room for one rank's weights
            role = opened.role(rank, layers)
        if in_target:
            role.projection = project_in_target(loaded.draft)
        progress(f"compiling the {which}")
        compiled = compile_as(role, f"target.rank{rank}" if ranks > 1 else "target", recipe.precision)
        files.append(compiled.file)
        found.append(check_compiled(role, compiled, recipe.precision))
    target, draft = _facts(role, files, recipe), None
    checks = {"target": max(filter(None, found), key=lambda check: check.error, default=None)}
    if ranks > 1:
        target.parameters = decoder_sizes(opened.config).total
    if loaded.draft is not None:
        progress("compiling the draft")
        compiled = compile_as(loaded.draft, "draft", recipe.draft_precision)
        checks["draft"] = check_compiled(loaded.draft, compiled, recipe.draft_precision)
        draft = _facts(loaded.draft, [compiled.file], recipe)
    checks = {name: check for name, check in checks.items() if check is not None}
    return {"target": target, "draft": draft, "checks": checks, "engine_facts": engine_facts}


def _written(opened: _OpenedPair, loaded: _LoadedPair, compiled: dict[str, Any], work: Path) -> Manifest:
    """Write what stands beside the networks; returns the manifest, which names all files."""
    recipe, config, tokenizer = opened.recipe, opened.config, loaded.tokenizer
    tokenizer.save_pretrained(work)
    eos = end_tokens(opened.target, config, tokenizer)
    write_config(work, eos, recipe.limits.context, config.vocab_size)
    if loaded.calibration is not None:
        write(work, CALIBRATION, loaded.calibration)
    files = sorted(p.relative_to(work).as_posix() for p in work.rglob("*") if p.is_file() and p.name != CALIBRATION)
    tools = (*engine_kind(recipe.engine).tools, *TOOLS)
    return Manifest(
        name=recipe.name,
        engine=recipe.engine,
        precision=recipe.precision,
        recipe=recipe,
        eos_token_ids=eos,
        sampling=recommended_sampling(opened.target, config, recipe.sampling),
        target_sha256=loaded.digest,
        draft_sha256=loaded.draft_digest,
        tokenizer=tokenizer.name_or_path if recipe.target.random_weights else "",
        tools={
            "echo-trt": __version__,
            "python": platform.python_version(),
            **{tool: importlib.metadata.version(tool) for tool in tools},
        },
        files={name: sha256(work / name) for name in files},
        **compiled,
    )


def _facts(role: Role, files: list[str], recipe: Recipe) -> NetworkFacts:
    config, target = role.network.config, isinstance(role, TargetModule)
    return NetworkFacts(
        file=files[0],
        rank_files=files if len(files) > 1 else [],
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=role.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        parameters=sum(p.numel() for p in role.network.parameters()),
        feature_size=feature_size(role) if "features" in role.inputs else 0,
        projected=getattr(role, "projected", False),
        block=None if target else draft_kind(recipe.draft.kind).block_facts(config),
        state_values=config.states.values if target else 0,
        state_row=config.states.row if target else 0,
    )


def _open(source: Source, recipe_folder: Path, draft: str = "") -> Checkpoint:
    """Open the checkpoint of a target or of a draft of the kind ``draft``, or one of its shape."""
    if source.random_weights:
        checkpoint: Checkpoint = of_lab("build", "random_checkpoint")(source, recipe_folder, draft)
        return checkpoint
    return open_checkpoint(locate(source, recipe_folder))


def _loaded_type(recipe: Recipe, precision: Precision) -> torch.dtype | None:
    """Return the dtype in which weights are loaded for a build; None: the checkpoint's own dtype."""
    if precision == "fp8":
        return E4M3
    # A divided network is too large to be read in more than it is built in, where the checkpoint has more.
    return None if recipe.tensor_parallel == 1 else TYPES[precision]


def _calibration(recipe: Recipe, recipe_folder: Path, digest: str, draft_digest: str) -> Calibration | None:
    if recipe.calibration is None:
        return None
    try:
        return read_calibration(recipe_folder / recipe.calibration, digest, draft_digest)
    except UserError as error:
        raise UserError(f"the recipe's calibration: {error}") from error
