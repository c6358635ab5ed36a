"""What a build of a real size takes: seconds, memory and disk. Prints a table in markdown.

    python scripts/benchmarks/build_memory.py qwen3-0.6b
    python scripts/benchmarks/build_memory.py qwen3-1.7b --precision int8 --draft none
    python scripts/benchmarks/build_memory.py qwen3-0.6b --engine torch

Writes a random checkpoint in bf16, and a random EAGLE-3 head of the same width, into a temporary folder. Builds them in
one process, then loads the bundle and generates in another. Memory is what the kernel counts for a process. "Its own"
leaves out the pages of mapped files, which the kernel takes back when memory is short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import yaml
from cyclopts import Parameter
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from echo_trt.engine.options import run_alone

END = "<|end|>"
DRAFT_VOCABULARY = 32000
SAMPLE_SECONDS = 0.02  # between two readings of a process's memory; larger: short peaks are missed
LOAD = """
import json, sys, time
import psutil
begin = time.perf_counter()
from echo_trt import LLM, SamplingParams
llm = LLM(sys.argv[1], "static", batch=1)
loaded, seconds = psutil.Process().memory_info(), time.perf_counter() - begin
tokens = llm.generate([llm.tokenizer.encode("A")], SamplingParams(max_tokens=8))[0].token_ids
ran = psutil.Process().memory_info()
print(json.dumps({"seconds": seconds, "loaded": loaded[:3], "ran": ran[:3], "tokens": list(tokens)}))
"""

#: name -> config.json's sizes.
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28},
    "qwen3-1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
    },
}
USUAL = {
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "torch_dtype": "bfloat16",
}
Shape = StrEnum("Shape", {name: name for name in SHAPES})


class Draft(StrEnum):
    eagle3 = "eagle3"
    none = "none"


@dataclass(frozen=True)
class Peaks:
    """The most that a process held, in bytes: in all, and of its own."""

    resident: int
    own: int


def main(
    shape: Shape,
    precision: Annotated[str, Parameter(help="of the bundle")] = "bf16",
    engine: Annotated[str, Parameter(help="of the bundle")] = "cpu",
    draft: Draft = Draft.eagle3,
    tied: Annotated[bool, Parameter(help="output matrix and embedding are one", negative="--no-tied")] = True,
    folder: Annotated[Path | None, Parameter(help="keep the checkpoint and the bundle there")] = None,
) -> None:
    """Build one shape and print what it took."""
    with tempfile.TemporaryDirectory() as temporary:
        index = folder or Path(temporary)
        recipe = write_pair(index, SHAPES[shape], draft, tied)
        stored = sum(file.stat().st_size for file in index.glob("*/*.safetensors"))
        bundle = index / f"bundle-{engine}-{precision}"
        begin = time.perf_counter()
        peaks = build(recipe, bundle, engine, precision)
        seconds = time.perf_counter() - begin
        written = sum(file.stat().st_size for file in bundle.iterdir())
        load = subprocess.run([sys.executable, "-c", LOAD, bundle], check=True, stdout=subprocess.PIPE, text=True)
        loaded = json.loads(load.stdout.splitlines()[-1])
        print(f"{shape}, {engine}, {precision}, draft {draft}; weights as stored: {gigabytes(stored)}\n")
        print("| | | times the weights as stored |")
        print("|---|---|---|")
        print(f"| build | {seconds:.0f} s | |")
        for name, size in (
            ("most memory of the build", peaks.resident),
            ("most memory of its own", peaks.own),
            ("bundle", written),
            ("memory of the loaded bundle", loaded["loaded"][0]),
            ("of its own", loaded["loaded"][0] - loaded["loaded"][2]),
            ("memory after 8 tokens", loaded["ran"][0]),
            ("of its own after 8 tokens", loaded["ran"][0] - loaded["ran"][2]),
        ):
            print(f"| {name} | {gigabytes(size)} | {size / stored:.2f} |")
        print(f"| load | {loaded['seconds']:.1f} s | |")
        print(f"\nTokens: {loaded['tokens']}")


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB"


def build(recipe: Path, bundle: Path, engine: str, precision: str) -> Peaks:
    """Run ``echo-trt build`` and watch its memory."""
    command = [sys.executable, "-m", "echo_trt", "build", str(recipe), "-o", str(bundle)]
    command += ["--engine", engine, "--precision", precision]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    resident = own = 0
    while process.poll() is None:
        try:
            memory = process.memory_info()
        except psutil.Error:
            break  # it has just ended
        resident, own = max(resident, memory.rss), max(own, memory.rss - memory.shared)
        time.sleep(SAMPLE_SECONDS)
    if code := process.wait():
        raise SystemExit(code)
    return Peaks(resident, own)


def write_pair(index: Path, sizes: dict[str, Any], draft: Draft, tied: bool) -> Path:
    """Write target, head and recipe into ``index``; what is there already is kept."""
    config = {
        **USUAL,
        **sizes,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "tie_word_embeddings": tied,
    }
    write_random(index / "target", config, target_shapes(config))
    write_tokenizer(index / "target")
    recipe: dict[str, Any] = {
        "name": "build-memory",
        "target": {"path": "target"},
        "limits": {"batch": 1, "context": 2048, "prefill_chunk": 64},
        "decoding": {"max_depth": 4},
    }
    if draft is Draft.eagle3:
        small = min(DRAFT_VOCABULARY, config["vocab_size"])
        head = config | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "num_hidden_layers": 1,
            "draft_vocab_size": small,
            "tie_word_embeddings": False,
        }
        write_random(index / "head", head, head_shapes(head), {"d2t": torch.zeros(small, dtype=torch.int64)})
        recipe["draft"] = {"kind": "eagle3", "source": {"path": "head"}}
    path = index / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def write_random(
    folder: Path,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    more: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write a checkpoint whose activations stay near 1: norms of ones, rows of about length 1."""
    if (folder / "model.safetensors").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generator = torch.Generator().manual_seed(7)
    tensors = dict(more or {})
    for name, shape in shapes.items():
        tensor = torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 2:
            tensor.normal_(0, shape[1] ** -0.5, generator=generator)
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors")


def target_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    vocabulary, hidden, size = (config[key] for key in ("vocab_size", "hidden_size", "head_dim"))
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes |= layer_shapes(prefix, config, hidden)
        shapes |= {f"{prefix}self_attn.{name}_norm.weight": (size,) for name in "qk"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocabulary, hidden)
    return shapes


def head_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, norms = config["hidden_size"], ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        "fc.weight": (hidden, 3 * hidden),
        **layer_shapes("midlayer.", config, 2 * hidden),
        **{f"midlayer.{name}.weight": (hidden,) for name in norms},
        "norm.weight": (hidden,),
        "lm_head.weight": (config["draft_vocab_size"], hidden),
    }


def layer_shapes(prefix: str, config: dict[str, Any], inputs: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's matrices, whose attention reads ``inputs`` numbers per token."""
    hidden, size, wide = config["hidden_size"], config["head_dim"], config["intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * size for kind in ("attention", "key_value"))
    heights = {"q": queries, "k": keys, "v": keys}
    return {
        **{f"{prefix}self_attn.{name}_proj.weight": (height, inputs) for name, height in heights.items()},
        f"{prefix}self_attn.o_proj.weight": (hidden, queries),
        **{f"{prefix}mlp.{name}_proj.weight": (wide, hidden) for name in ("gate", "up")},
        f"{prefix}mlp.down_proj.weight": (hidden, wide),
    }


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of bytes, without merges."""
    symbols = [END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)


if __name__ == "__main__":
    run_alone(main)
