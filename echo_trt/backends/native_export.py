"""Export of PyTorch to ONNX in standard operators alone: padded batches over linear caches, without the plugin.

B requests of at most T new tokens are padded to [B, T]; the KV rows of request b are row b of [B, Hk, C, D] caches. F
is the graph's float type (float32, float16 or bfloat16), and N = B * T:

| input                       | type, shape              | meaning                                                     |
|-----------------------------|--------------------------|-------------------------------------------------------------|
| token_ids, positions        | int64 [B, T]             | new tokens; padding may be any valid ones                   |
| features (head only)        | F [M, 3 * H_target]      | as in the packed graph                                      |
| hidden (head only)          | F [P, H]                 | as in the packed graph; M or P may be 0                     |
| state_rows (head only)      | int64 [B, T]             | a token's row of features and hidden, end to end            |
| features (block drafter)    | F [M, L * H_target]      | as in the packed graph                                      |
| state_rows (block drafter)  | int64 [B, T]             | a token's state: one of logit_rows', or R + a features' row |
| past_lens                   | int32 [B]                | committed tokens; past_lens + T <= C                        |
| tree_mask                   | uint8 [B, T, T]          | 1: the token sees that new token; padding sees none         |
| logit_rows                  | int64 [R]                | rows whose next token is wanted, as b * T + t               |
| key_cache.i, value_cache.i  | F [B, Hk, C, D]          | layer i's rows, all finite, used or not                     |

| output                             | type, shape              | of                                                   |
|------------------------------------|--------------------------|------------------------------------------------------|
| logits                             | F [R, V]                 | the target                                           |
| features                           | F [N, 3 * H]             | a target with a head                                 |
| scores, candidates                 | float32, int64 [R, k]    | a draft, a head                                      |
| state                              | F [N, H]                 | a head                                               |
| new_key_cache.i, new_value_cache.i | F [B, Hk, C, D]          | all; may be bound to the inputs' memory              |

The dynamic axes are named batch (B), tokens (T), rows (R), feature_rows (M) and hidden_rows (P).

The T new rows of request b are written at past_lens[b], and rows of padding are zeros. A row is masked by adding the
lowest float16 number to its score: its weight is then exactly zero, as long as the row is finite.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.onnx import ops

from echo_trt.backends.onnx_export import cache_names, trace
from echo_trt.models.layers import Attend
from echo_trt.models.roles import BlockModule, HeadModule, Role

OPSET = 24
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PADDED = ("token_ids", "positions", "state_rows")
METADATA = ("past_lens", "tree_mask", "logit_rows")
#: Added to the score of a masked row. Lower: an infinity in float16, which makes a row without visible tokens NaN.
HIDDEN_SCORE = torch.finfo(torch.float16).min


def export_native(role: Role, path: Path, precision: str, context: int) -> None:
    """Write the graph to ``path`` (.onnx), its weights beside it (.onnx.data).

    ``precision``, of weights, caches and activations, is fp32, fp16 or bf16. ``context`` is C, a slot's cache rows:
    the longest context and the largest T together.
    """
    role = in_precision(role, precision)
    states = ["state_rows"] if isinstance(role, HeadModule) else []
    caches = cache_names(role.num_layers)
    inputs = [*role.inputs, *states, *METADATA, *caches]
    outputs = [*role.outputs, *(f"new_{name}" for name in caches)]
    program = trace(_NativeGraph(role), *_example(role, context), inputs, outputs, OPSET)
    program.save(path, external_data=True)


def in_precision(role: Role, precision: str) -> Role:
    """Copy ``role`` to ``precision``; weights that have this type already are shared."""
    dtype = TYPES[precision]
    shared = {id(p): p for p in role.parameters() if p.dtype == dtype}
    return copy.deepcopy(role, shared).to(dtype)


class _NativeGraph(nn.Module):
    """A role whose attention is the standard operator, over padded batches and linear caches."""

    def __init__(self, role: Role):
        super().__init__()
        self.role = role

    def forward(self, inputs: dict[str, Tensor], metadata: dict[str, Tensor], caches: list[Tensor]):
        flat = {name: x.flatten() if name in PADDED else x for name, x in inputs.items()}
        written: list[Tensor] = []
        attend = self._attend(inputs["positions"], metadata["past_lens"], metadata["tree_mask"], caches, written)
        return *self.role(flat, metadata["logit_rows"], attend), *written

    def _attend(
        self, positions: Tensor, past_lens: Tensor, tree_mask: Tensor, caches: list[Tensor], written: list[Tensor]
    ) -> Attend:
        config, head_dim = self.role.network.config, self.role.network.config.head_dim
        batch, tokens = tree_mask.shape[:2]
        write_indices = past_lens.long()
        mask = _additive_mask(past_lens, tree_mask, caches[0])
        windows = {config.window_of(layer) for layer in range(self.role.num_layers)}
        masks = {size: _windowed(mask, positions, past_lens, size) if size else mask for size in windows}
        # Padding may compute NaN, which would stay in the cache and turn masked rows, of weight zero, into NaN.
        padding = (tree_mask.to(mask.dtype).amax(dim=2) == 0).view(-1, 1)

        def by_head(x: Tensor) -> Tensor:
            return x.view(batch, tokens, -1, head_dim).transpose(1, 2)

        def write(cache: Tensor, rows: Tensor) -> Tensor:
            new = ops.symbolic(
                "TensorScatter", (cache, by_head(rows.masked_fill(padding, 0)), write_indices), {"axis": 2},
                dtype=cache.dtype, shape=cache.shape, version=OPSET,
            )  # fmt: skip
            written.append(new)
            return new

        def attend(layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            queries = by_head(query)
            keys, values = write(caches[2 * layer], key), write(caches[2 * layer + 1], value)
            arguments = queries, keys, values, masks[config.window_of(layer)]
            output = ops.symbolic("Attention", arguments, {}, dtype=query.dtype, shape=queries.shape, version=OPSET)
            return output.transpose(1, 2).reshape(query.shape)

        return attend


def _additive_mask(past_lens: Tensor, tree_mask: Tensor, cache: Tensor) -> Tensor:
    """Compute the mask that is added to scores, [B, 1, T, C]: 0 where a token sees a cache row, else HIDDEN_SCORE."""
    tokens, rows = tree_mask.shape[2], cache.shape[2]
    hidden = (1 - tree_mask.to(cache.dtype)) * HIDDEN_SCORE
    column = torch.arange(rows, dtype=torch.int32) - past_lens[:, None]  # [B, C], a row's index among the new tokens
    column_index = column.clamp(0, tokens - 1).long()[:, None].expand(-1, tokens, -1)
    among_new = hidden.gather(2, column_index)
    column = column[:, None]
    unseen = torch.where(column < tokens, among_new, HIDDEN_SCORE)
    return torch.where(column < 0, 0.0, unseen)[:, None]


def _windowed(mask: Tensor, positions: Tensor, past_lens: Tensor, window: int) -> Tensor:
    """Hide in a mask [B, 1, T, C] what is ``window`` positions or more before a token's, of ``positions`` [B, T]."""
    row = torch.arange(mask.shape[-1])[None]
    column = row - past_lens[:, None]  # [B, C], a row's index among the new tokens
    new = positions.gather(1, column.clamp(0, positions.shape[1] - 1).long())
    distance = positions[:, :, None] - torch.where(column < 0, row, new)[:, None]
    return mask.masked_fill((distance >= window)[:, None], HIDDEN_SCORE)


def _example(role: Role, context: int) -> tuple[tuple, tuple]:
    """Make the tracer's inputs, of different sizes along different axes, and their dynamic axes."""
    config, dtype = role.network.config, next(role.parameters()).dtype
    batch, tokens = 3, 5
    padded = {0: Dim("batch"), 1: Dim("tokens")}
    inputs = {name: torch.zeros(batch, tokens, dtype=torch.long) for name in ("token_ids", "positions")}
    axes = dict.fromkeys(inputs, padded)
    widths = {}
    if isinstance(role, HeadModule):
        widths = {"features": 3 * config.target_hidden_size, "hidden": config.hidden_size}
    if isinstance(role, BlockModule):
        widths = {"features": config.feature_size}
    for rows, (name, width) in enumerate(widths.items(), 7):
        inputs[name] = torch.zeros(rows, width, dtype=dtype)
        axes[name] = {0: Dim(f"{name.removesuffix('s')}_rows")}
    if widths:
        inputs["state_rows"], axes["state_rows"] = torch.zeros(batch, tokens, dtype=torch.long), padded
    metadata = {
        "past_lens": torch.zeros(batch, dtype=torch.int32),
        "tree_mask": torch.zeros(batch, tokens, tokens, dtype=torch.uint8),
        "logit_rows": torch.zeros(2, dtype=torch.long),
    }
    of_metadata = {"past_lens": {0: padded[0]}, "tree_mask": {**padded, 2: padded[1]}, "logit_rows": {0: Dim("rows")}}
    # One tensor a cache: the exporter takes two uses of one tensor for one input.
    shape = batch, config.num_kv_heads, context, config.head_dim
    caches = [torch.zeros(shape, dtype=dtype) for _ in range(2 * role.num_layers)]
    return (inputs, metadata, caches), (axes, of_metadata, [{0: padded[0]}] * len(caches))
