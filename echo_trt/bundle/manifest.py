"""The manifest of a bundle, the folder that a build leaves: it names every file with its hash."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from echo_trt.bundle.recipe import EngineName, Precision, Recipe, Sampling
from echo_trt.errors import UserError, first_mistake, shown
from echo_trt.files.extras import DRAFTS, ENGINES, extra, registered
from echo_trt.files.inputs import read_text

FORMAT = 2
MANIFEST = "manifest.json"
NGRAMS = "ngrams.npz"
CONFIDENCE = "confidence.npy"  # what the previous token adds to the logit of a block drafter's confidence head


def _within(name: str) -> str:
    path = PurePosixPath(name)
    if not path.name or path.is_absolute() or ".." in path.parts:
        raise ValueError("it must name a file within the bundle")
    return name


FileName = Annotated[str, AfterValidator(_within)]
Width = Annotated[int, Field(ge=1, le=2**24)]
Extent = Annotated[int, Field(ge=0, le=2**24)]  # 0: of a draft without attention


class _Facts(BaseModel):
    model_config = ConfigDict(extra="forbid")


class BlockFacts(_Facts):
    """States how a block drafter's pass looks, as ``models.config.BlockConfig``. ``both_ways``: not causal."""

    rows: Annotated[int, Field(ge=2, le=36)]
    mask_token: Annotated[int, Field(ge=0)]
    both_ways: bool
    anchored: bool
    predicts_next: bool
    confidence: bool = False


class NetworkFacts(_Facts):
    """States a network's file and sizes, so that the runtime need not load its framework.

    rank_files    one file per rank where the network is divided; the first is ``file``
    num_kv_heads  of one rank, where the network is divided
    feature_size  numbers of the features that an EAGLE-3 head or a block drafter reads of one token
    projected     whether these are the draft's projection of them, a hidden state, which the target's graph makes
    block         of a block drafter
    state_values  float32 values of a request's states, of a target with recurrent layers
    state_row     and of a pass's row, until it is committed
    """

    file: FileName
    rank_files: list[FileName] = []
    vocab_size: Width
    hidden_size: Width
    num_layers: Extent
    num_kv_heads: Extent
    head_dim: Extent
    parameters: Annotated[int, Field(ge=0, le=10**15)]
    feature_size: Extent = 0
    projected: bool = False
    block: BlockFacts | None = None
    state_values: Annotated[int, Field(ge=0, le=2**32)] = 0
    state_row: Annotated[int, Field(ge=0, le=2**32)] = 0

    @property
    def kv_values(self) -> int:
        """Values that one cached token takes, of one rank where the network is divided."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim

    @property
    def keeps_states(self) -> bool:
        return self.state_values > 0

    def state_bytes(self, requests: int, copies: int, rows: int) -> int:
        """Bytes of the states of running requests, with ``copies`` of each, and of a pass's ``rows`` beside them."""
        return 4 * (self.state_values * requests * (1 + copies) + self.state_row * rows)


class SelfCheck(_Facts):
    """Compares a compiled engine with the PyTorch reference, on a prompt and on a tree: error over largest logit.

    By ``measure`` perplexity, errors are rises of the perplexity of the reference's text: a target's in few bits.
    The ranks of a divided network are checked one by one, and the largest error is kept. ``layers``: the first ones
    that were compared; None: all.
    """

    prompt_error: float
    tree_error: float
    bound: float
    same_argmax: float
    measure: Literal["logits", "perplexity"] = "logits"
    layers: int | None = None

    @property
    def error(self) -> float:
        """What ``bound`` is about; a tree's perplexity, of few random tokens, has a wider one."""
        return self.prompt_error if self.measure == "perplexity" else max(self.prompt_error, self.tree_error)

    @property
    def sentence(self) -> str:
        """Say how far the engine is off, and how far it may be."""
        if self.measure == "perplexity":
            rises = f"{self.prompt_error:+.1%} on the target's own text, {self.tree_error:+.1%} on a tree"
            return f"a perplexity of {rises} (bound {self.bound:+.0%})"
        where = f" in its first {self.layers} layers" if self.layers else ""
        return f"an error of {self.error:.1e} of the largest logit{where} (bound {self.bound:g})"


class Manifest(_Facts):
    """Holds manifest.json.

    target_sha256  of the target's checkpoint; a head and a calibration belong to it
    draft_sha256   of the draft's checkpoint, "" without a draft network; a calibration belongs to it
    checks         network -> self-check; a network that could not be checked where it was built is missing
    files          name -> sha256
    engine_facts   what the engine must find as it was when it opens the bundle
    sampling       what recipe and checkpoint recommend: defaults of requests
    tokenizer      whose it is where the target's weights are random; "": the target's
    """

    format: Literal[2] = FORMAT
    name: str
    engine: EngineName
    precision: Precision
    recipe: Recipe
    target: NetworkFacts
    draft: NetworkFacts | None
    eos_token_ids: list[Annotated[int, Field(ge=0)]]
    target_sha256: str
    draft_sha256: str
    engine_facts: dict[str, str | list[str]] = {}
    checks: dict[str, SelfCheck]
    tools: dict[str, str]
    files: dict[FileName, str]
    sampling: Sampling = Sampling()
    tokenizer: str = ""

    @property
    def sentence(self) -> str:
        """Say what was built, and how far it is off."""
        checks = "; ".join(f"the {name} has {check.sentence}" for name, check in self.checks.items())
        return f"{self.name} for {self.engine} in {self.precision}; {checks or 'no self-check could be run here'}"

    @model_validator(mode="after")
    def _is_whole(self) -> Manifest:
        kind = self.recipe.draft.kind
        known = extra(DRAFTS, kind)
        if (self.draft is not None) != known.network:
            raise ValueError(f"draft is {'not used' if self.draft else 'missing'} for recipe.draft.kind {kind}")
        for network in filter(None, (self.target, self.draft)):
            for file in (network.file, *network.rank_files):
                if file not in self.files:
                    raise ValueError(f"files has no hash of {file}")
        if self.draft is not None and (self.draft.block is not None) != known.block:
            raise ValueError(f"draft.block is {'not used' if self.draft.block else 'missing'} for draft.kind {kind}")
        if self.draft and self.draft.block and self.draft.block.confidence and CONFIDENCE not in self.files:
            raise ValueError(f"files has no hash of {CONFIDENCE}")
        if self.recipe.draft.ngrams is not None and NGRAMS not in self.files:
            raise ValueError(f"files has no hash of {NGRAMS}")
        return self

    @model_validator(mode="after")
    def _networks_fit(self) -> Manifest:
        last, largest = max(self.eos_token_ids, default=0), self.target.vocab_size - 1
        if last > largest:
            raise ValueError(f"eos_token_ids has {last}, and the last token is {largest}")
        if self.draft:
            self._draft_fits(self.draft)
        return self

    def _draft_fits(self, draft: NetworkFacts) -> None:
        size, hidden, block = draft.feature_size, self.target.hidden_size, draft.block
        wanted = (
            draft.hidden_size if draft.projected else hidden * (extra(DRAFTS, self.recipe.draft.kind).features or 0)
        )
        if draft.file == self.target.file:
            raise ValueError(f"draft.file is {draft.file}, which is target.file")
        if wanted and size != wanted:
            raise ValueError(f"draft.feature_size is {size}, but the target's features have {wanted} numbers")
        if block and not wanted and (size < 1 or size % hidden):
            raise ValueError(f"draft.feature_size is {size}, no multiple of target.hidden_size")
        if block and block.mask_token >= draft.vocab_size:
            raise ValueError(
                f"draft.block.mask_token is {block.mask_token}, and the last token is {draft.vocab_size - 1}"
            )


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the bundle ``folder``. Raises UserError where this version can read none."""
    path = folder / MANIFEST
    if not os.path.exists(folder):
        raise UserError(f"there is no bundle or GGUF file {folder}; check the path, or make one with echo-trt build.")
    if not path.is_file():
        raise UserError(f"{folder} is not a bundle: it holds no {MANIFEST}; make one with echo-trt build.")
    try:
        text = read_text(path)
        raw: dict[str, Any] = json.loads(text)
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(f"{path} is not readable JSON ({error}); build the bundle again.") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        stated = raw.get("format") if isinstance(raw, dict) else None
        raise UserError(f"{path}: format is {shown(stated)}, but this version reads {FORMAT}; build the bundle again.")
    try:
        return Manifest.model_validate_json(json.dumps(_without_retired(raw)))
    except ValidationError as error:
        raise UserError(f"{path}: {first_mistake(error)}; build the bundle again.") from error


def _without_retired(raw: dict[str, Any]) -> dict[str, Any]:
    """Leave out what earlier versions wrote and no version reads any more, and find what they wrote elsewhere."""
    for name in registered(ENGINES):  # under which an engine's facts stood
        if facts := raw.pop(name, None):
            raw["engine_facts"] = facts
    checks, draft = raw.get("checks"), raw.get("draft")
    block = draft.get("block") if isinstance(draft, dict) else None
    recipe = raw.get("recipe")
    decoding = recipe.get("decoding") if isinstance(recipe, dict) else None
    for part in (recipe, decoding, block, *(checks.values() if isinstance(checks, dict) else ())):
        if isinstance(part, dict):
            for key in ("compute_capability", "fixed_threshold", "markov", "of"):
                part.pop(key, None)
    return raw


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a bundle with a file that is missing or was changed after the build."""
    ranks, built = manifest.recipe.tensor_parallel, len(manifest.target.rank_files) or 1
    if ranks != built:
        raise UserError(f"bundle {folder} holds {built} of the target's {ranks} ranks; build it again.")
    for name in manifest.files:
        file = folder / name
        if not file.is_file():
            raise UserError(f"bundle {folder} lacks its file {name}; build it again.")
    with ThreadPoolExecutor() as pool:  # files of a divided target are hundreds of GB, and hashing holds no lock
        list(pool.map(_verify, (folder / name for name in manifest.files), manifest.files.values()))


def _verify(file: Path, digest: str) -> None:
    try:
        actual = sha256(file)
    except OSError as error:
        raise UserError(f"bundle file {file} cannot be read ({error.strerror}); build it again.") from error
    if actual != digest:
        raise UserError(f"bundle file {file} was changed after the build (its hash does not fit); build it again.")


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
