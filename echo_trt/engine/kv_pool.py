"""The size of a bundle's KV pool on the machine that opens it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from echo_trt.backends.kind import engine_kind
from echo_trt.backends.states import KEPT
from echo_trt.bundle.manifest import Manifest
from echo_trt.engine.host_memory import OPTION, available_memory, gigabytes, memory_limit, total_memory
from echo_trt.errors import UserError
from echo_trt.speculation.pack import BLOCK
from echo_trt.speculation.policies import reserve_for

#: Share of the memory beside the weights that a pool on a CPU may take, where nobody chooses. Larger: more requests at
#: once and a larger prefix cache, and less memory for other programs and for passes over long prompts.
SHARE = 0.5
#: Bytes of a server's processes on a CPU, measured, and tokens of a long pass, whose logits come on top. Larger: more
#: containers are refused.
PROCESSES, PASS = 400_000_000, 1024


@dataclass(frozen=True)
class KVPool:
    """A KV pool, of all running requests and the prefix cache.

    blocks          of 32 tokens
    block_bytes     of a block, with the features of its tokens, which a draft reads
    request_blocks  of a request of ``context`` tokens, the longest
    available       bytes of this machine's memory that the weights leave free; None: of a GPU, whose engine checks it
    states          bytes of states of a target with recurrent layers, those that its prefix cache keeps among them
    """

    blocks: int
    block_bytes: int
    request_blocks: int
    context: int
    available: int | None = None
    states: int = 0

    @property
    def bytes(self) -> int:
        return self.blocks * self.block_bytes

    @property
    def requests(self) -> int:
        """Requests of full length that run at once; more of shorter ones do."""
        return self.blocks // self.request_blocks

    @property
    def sentence(self) -> str:
        full = f"{self.requests:,} request{'s' * (self.requests != 1)} of {self.context:,} tokens"
        states = f"; up to {gigabytes(self.states)} of states beside it" if self.states else ""
        return f"KV pool: {gigabytes(self.bytes)}, {self.blocks * BLOCK:,} tokens, {full}{states}"

    @property
    def warning(self) -> str:
        """Say that the pool is larger than it would be by default; empty where it is not."""
        if self.available is None or self.bytes <= max(SHARE * self.available, self.request_blocks * self.block_bytes):
            return ""
        return (
            f"the KV pool may grow to {gigabytes(self.bytes)}, and {gigabytes(self.available)} of this machine's "
            f"memory are left beside the weights; choose less with {OPTION}."
        )


def kv_pool(
    folder: Path, manifest: Manifest, batch: int | None = None, memory: int | None = None, processes: int = 1
) -> KVPool:
    """Return the pool of the bundle in ``folder``, for ``batch`` running requests (None: the recipe's).

    memory     bytes that a user chose; None: limits.kv_blocks, or else enough for the batch, but on a CPU no more than
               SHARE of the memory beside the weights
    processes  engines that share this machine

    Raises UserError where one request of full length does not fit.
    """
    limits, own = manifest.recipe.limits, manifest.recipe.draft_precision
    networks = [(manifest.target, manifest.precision), *([(manifest.draft, own)] if manifest.draft else [])]
    size, needed = block_bytes(manifest.engine, networks), manifest.recipe.request_blocks
    requests = batch or limits.batch
    rows = requests * reserve_for(manifest.recipe.decoding.model_dump()) + limits.prefill_chunk
    states = manifest.target.state_bytes(requests, KEPT * limits.prefix_cache, rows)
    maximum, available = limits.kv_blocks or needed * requests, None
    if engine_kind(manifest.engine).on_host:
        fixed = _weights(folder, manifest) + states
        available = available_memory() // processes - fixed
        if limit := memory_limit():
            fixed += PROCESSES + 4 * PASS * manifest.target.vocab_size
            maximum = min(maximum, _under_limit(limit // processes, fixed, needed * size, limits.context) // size)
    if memory is not None:
        if available is not None and memory > (total := total_memory()):
            raise UserError(
                f"{OPTION} is {gigabytes(memory)}, but this machine has {gigabytes(total)} of memory, of which "
                f"{gigabytes(max(available, 0))} are free beside the weights; give less, or leave it out."
            )
        blocks = _chosen(manifest, memory, size)
    elif limits.kv_blocks or available is None:
        blocks = maximum
    else:
        _check_available(available, size, needed, limits.context)
        blocks = default_blocks(maximum, available, size, needed)
    return KVPool(blocks, size, needed, limits.context, available, states)


def default_blocks(maximum: int, available: int, size: int, needed: int) -> int:
    """Return the blocks, of ``size`` bytes, of a pool that nobody sized, from ``needed`` for one request on."""
    return min(maximum, max(int(SHARE * available) // size, needed))


def _under_limit(limit: int, fixed: int, needed: int, context: int) -> int:
    """Return the bytes that a limit of memory leaves for a pool, beside ``fixed`` ones. Raises UserError for too few.

    needed  bytes of one request of ``context`` tokens
    """
    if limit < fixed + needed:
        raise UserError(
            f"this container's memory limit is {limit / 1e9:.2f} GB, but the bundle needs {(fixed + needed) / 1e9:.2f} "
            f"GB, of them {gigabytes(needed)} for one request of limits.context {context:,} tokens; raise the limit."
        )
    return limit - fixed


def _chosen(manifest: Manifest, memory: int, size: int) -> int:
    """Return the blocks of ``size`` bytes that ``memory`` bytes hold."""
    if engine_kind(manifest.engine).fixed_pool:
        raise UserError(f"{OPTION} is given, but {manifest.engine} compiles the pool in; leave it out, or build again.")
    check_memory(memory, manifest.recipe.request_blocks * size, manifest.recipe.limits.context)
    return memory // size


def check_memory(memory: int, needed: int, context: int) -> None:
    """Refuse ``memory`` bytes for a pool where a request of ``context`` tokens takes ``needed``."""
    if memory < needed:
        raise UserError(
            f"{OPTION} is {gigabytes(memory)}, but one request of limits.context {context:,} tokens takes "
            f"{gigabytes(needed)}; raise it, or build with a lower --max-model-len."
        )


def _check_available(available: int, size: int, needed: int, context: int) -> None:
    """Refuse a machine with ``available`` bytes where they are less than ``needed`` blocks of ``size`` bytes."""
    if available >= needed * size:
        return
    fits = context - (needed - max(available, 0) // size) * BLOCK
    shorter = f", or build with --max-model-len {fits}" if fits >= BLOCK else ""
    raise UserError(
        f"one request of limits.context {context:,} tokens takes {gigabytes(needed * size)} of KV cache, but "
        f"{gigabytes(max(available, 0))} of this machine's memory are left beside the weights; free some{shorter}."
    )


def block_bytes(engine: str, networks: Iterable[tuple[Any, str]]) -> int:
    """Return the bytes of a block in the pools of ``networks``, with precisions, and of its tokens' features.

    A network states its ``kv_values`` of a cached token, on one GPU where it is divided, ``feature_size`` and
    ``hidden_size``.
    """
    kind, total = engine_kind(engine), 0
    host = kind.on_host
    for network, precision in networks:
        value = kind.value_bytes(precision)
        features = network.feature_size if host else kept_features(engine, network)
        total += network.kv_values * value + features * (4 if host else value)
    return BLOCK * total


def kept_features(engine: str, network: Any) -> int:
    """Return the values that a draft keeps on a GPU of a token's features, or of its projection of them."""
    card, size = engine_kind(engine).card, network.feature_size
    return int(network.hidden_size if size and card and card.projects_features == "cache" else size)


def _weights(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of the networks' files, about what their engines take for the weights."""
    files = [name for name in manifest.files if name.split(".")[0] in ("target", "draft")]
    return sum((folder / name).stat().st_size for name in files)
