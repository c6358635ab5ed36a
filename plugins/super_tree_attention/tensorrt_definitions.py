"""The plugin's definition for TensorRT: outputs and launch. Importing this module registers it.

TensorRT reads annotations as objects when a function is registered, so their evaluation is not postponed here.
"""

import math
import warnings

import tensorrt as trt
import tensorrt.plugin as trtp
import torch

from super_tree_attention.tensorrt_plugin import NAMESPACE, OPERATOR
from super_tree_attention.triton_attention import super_tree_attention_triton

Desc, Tensor = trtp.TensorDesc, trtp.Tensor
_ID = f"{NAMESPACE}::{OPERATOR}"
_TYPES = {
    trt.DataType.HALF: torch.float16, trt.DataType.BF16: torch.bfloat16, trt.DataType.FLOAT: torch.float32,
    trt.DataType.INT32: torch.int32,
}  # fmt: skip


# Without an ``autotune`` there is one combination of types, the network's, and nothing to time, which TensorRT would do
# with made-up block tables.
@trtp.register(_ID)
def _describe(
    query: Desc, key: Desc, value: Desc, key_cache: Desc, value_cache: Desc, past_lens: Desc, seq_begins: Desc,
    block_indices: Desc, block_begins: Desc, tree_mask: Desc, tree_mask_begins: Desc, sliding_window: int,
) -> tuple[Desc, Desc, Desc]:  # fmt: skip
    return query.like(), key_cache.like(), value_cache.like()


@trtp.impl(_ID)
def _launch(
    query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, past_lens: Tensor,
    seq_begins: Tensor, block_indices: Tensor, block_begins: Tensor, tree_mask: Tensor, tree_mask_begins: Tensor,
    sliding_window: int, outputs: tuple[Tensor], stream: int,
) -> None:  # fmt: skip
    output, *caches = outputs
    with torch.inference_mode(), torch.cuda.stream(torch.cuda.ExternalStream(stream)):
        for cache, written in zip((key_cache, value_cache), caches, strict=True):
            if cache.data_ptr != written.data_ptr:
                copied = memory(written).copy_(memory(cache)).nbytes
                warnings.warn(f"TensorRT keeps a KV cache twice, and a call copies {copied} bytes", stacklevel=2)
        packed = (memory(tensor) for tensor in (query, key, value, *caches))
        tables = (memory(tensor) for tensor in (past_lens, seq_begins, block_indices, block_begins))
        mask = memory(tree_mask).view(torch.uint8)
        begins, out = memory(tree_mask_begins), memory(output)
        super_tree_attention_triton(*packed, *tables, mask, begins, sliding_window, out=out)


class _Bytes:
    def __init__(self, address: int, count: int):
        self.__cuda_array_interface__ = {"data": (address, False), "shape": (count,), "typestr": "|u1", "version": 3}


def memory(tensor: Tensor) -> torch.Tensor:
    """Return TensorRT's tensor as PyTorch's, on the same memory."""
    dtype, shape = _TYPES[tensor.dtype], tuple(tensor.shape)
    count = math.prod(shape) * dtype.itemsize
    return torch.as_tensor(_Bytes(tensor.data_ptr, count), device="cuda").view(dtype).view(shape)
