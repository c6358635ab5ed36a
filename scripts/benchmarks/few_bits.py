"""Compare bundles and llama.cpp's files by perplexity and best tokens on a text or on answers, size and pass times.

    CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python   # compiles for this CPU
    python scripts/benchmarks/few_bits.py bundles/fp32 bundles/int8 bundles/int4 q8_0.gguf q4_k_m.gguf \
        --prompts scripts/demo_prompts.jsonl --passes 1,2,4,8

    python scripts/benchmarks/few_bits.py bundles/coder models/qwen2.5-coder-1.5b-q4_k_m.gguf --text docs/goodput.md

The first engine is the reference. It writes the answers at temperature 1, so that the logarithm of the perplexities'
ratio is about the distance (KL divergence) of two networks. A text is cut into parts of 512 tokens. A GGUF file that is
missing is made of the reference's checkpoint: its name ends in the type, such as Q4_K_M. Passes verify a chain behind a
text of 200 tokens, in turns of all engines; the fastest of each size is shown, relative to the reference's in brackets.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from cyclopts import Parameter, run
from transformers import AutoTokenizer

from echo_trt import LLM, SamplingParams
from echo_trt.backends.cuda.sizes import CallBounds
from echo_trt.backends.kind import engine_kind
from echo_trt.bundle.manifest import read_manifest
from echo_trt.bundle.sources import locate
from echo_trt.cli.recipes import shipped_folder
from echo_trt.files.prompts import read_prompts
from echo_trt.speculation.pack import BLOCK, pack

PAST, LONGEST = 200, 512  # tokens behind which a pass is timed, and of a text
NONE = np.zeros(1, np.int64)


class Bundle:
    """The target of a bundle."""

    def __init__(self, path: Path):
        manifest = read_manifest(path)
        self.name, self.vocabulary = f"{manifest.engine} {manifest.precision}", manifest.target.vocab_size
        file = path / manifest.target.file
        self.bytes = sum(each.stat().st_size for each in path.glob(f"{file.name}*"))
        blocks = LONGEST // BLOCK
        self._engine = engine_kind(manifest.engine).open(
            file, manifest.precision, blocks, CallBounds(1, blocks, LONGEST), manifest.engine_facts
        )

    def run(self, ids: np.ndarray, past: int = 0) -> np.ndarray:
        """Return the logits of all ``ids``, float32 [N, V]."""
        rows, table = np.arange(len(ids)), np.arange(LONGEST // BLOCK)[None]
        call = pack(ids, past + rows, NONE + past, np.array([len(ids)]), table, rows)
        return self._engine.run(call)["logits"]


class Gguf:
    """A file in llama.cpp."""

    def __init__(self, path: Path):
        import llama_cpp

        self._c, threads = llama_cpp, os.cpu_count() or 1
        self.name, self.bytes = f"llama.cpp {path.stem.rpartition('-')[2]}", path.stat().st_size
        llama_cpp.llama_log_set(_silent, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = LONGEST
        settings.n_threads = settings.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(LONGEST, 0, 1)

    def run(self, ids: np.ndarray, past: int = 0) -> np.ndarray:
        """Return the logits of all ``ids``, float32 [N, V]."""
        self._c.llama_memory_seq_rm(self._c.llama_get_memory(self._context), 0, past, -1)
        self._batch.n_tokens = len(ids)
        for i, token in enumerate(ids.tolist()):
            self._batch.token[i], self._batch.pos[i] = token, past + i
            self._batch.n_seq_id[i], self._batch.seq_id[i][0], self._batch.logits[i] = 1, 0, 1
        if self._c.llama_decode(self._context, self._batch):
            raise SystemExit(f"{self.name} does not take a pass of {len(ids)} tokens.")
        logits = self._c.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (len(ids), self.vocabulary))


@ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
def _silent(level: int, text: bytes, data: Any) -> None:
    pass


def main(
    engines: Annotated[list[Path], Parameter(help="bundles and .gguf files; the first is the reference, a bundle")],
    prompts: Annotated[list[Path] | None, Parameter(help="JSONL files, whose answers are scored")] = None,
    text: Annotated[list[Path] | None, Parameter(help="files of text, which is scored")] = None,
    limit: Annotated[int, Parameter(help="prompts of each file")] = 24,
    max_tokens: Annotated[int, Parameter(help="of an answer")] = 128,
    passes: Annotated[str, Parameter(help="tokens of timed passes, by commas")] = "",
    rounds: Annotated[int, Parameter(help="of timed passes; a round has ten of each size")] = 8,
) -> None:
    """Print a table in markdown."""
    opened: list[Bundle | Gguf] = []
    for path in engines:
        if path.suffix == ".gguf" and not path.exists():
            _make(path, engines[0])
        opened.append(Gguf(path) if path.suffix == ".gguf" else Bundle(path))
    texts = [each for file in prompts or () for each in answers(engines[0], file, limit, max_tokens)]
    texts += [part for file in text or () for part in parts(engines[0], file)]
    scores = _scores(opened, texts)
    counts = [int(count) for count in passes.split(",") if count]
    times = _times(opened, counts, rounds)
    headings = ["weights", "MB", *(["perplexity", "to the reference", "same best token"] if texts else [])]
    headings += [f"T({count}), ms" for count in counts]
    print(f"| {' | '.join(headings)} |\n{'|---' * len(headings)}|")
    for i, engine in enumerate(opened):
        cells = [engine.name, f"{engine.bytes / 1e6:.1f}"]
        if texts:
            loss, same = scores[i]
            cells += [f"{np.exp(loss):.4f}", f"{np.expm1(loss - scores[0][0]):+.2%}", f"{same:.2%}"]
        cells += [f"{1e3 * t:.2f} ({t / first:.2f})" for t, first in zip(times[i], times[0], strict=True)]
        print(f"| {' | '.join(cells)} |", flush=True)


def answers(bundle: Path, file: Path, limit: int, max_tokens: int) -> list[tuple[np.ndarray, int]]:
    """Return texts, int64 [N], of prompts with the bundle's answers at temperature 1, and where the answers begin."""
    llm = LLM(bundle, "autoregressive", 8)
    asked = [llm.chat_ids(prompt.text) for prompt in read_prompts(file)[:limit]]
    asked = [ids for ids in asked if len(ids) + max_tokens < LONGEST]
    params = [SamplingParams(max_tokens, temperature=1.0, seed=i) for i in range(len(asked))]
    written = llm.generate(asked, params)
    return [(np.array([*ids, *a.token_ids]), len(ids)) for ids, a in zip(asked, written, strict=True)]


def parts(bundle: Path, file: Path) -> list[tuple[np.ndarray, int]]:
    """Return a file's text in parts of LONGEST tokens, int64 [N], whose first token is given."""
    ids = np.array(AutoTokenizer.from_pretrained(bundle).encode(file.read_text("utf-8")))
    return [(ids[begin : begin + LONGEST], 1) for begin in range(0, len(ids) - LONGEST + 1, LONGEST)]


def _scores(engines: list[Bundle | Gguf], texts: list[tuple[np.ndarray, int]]) -> np.ndarray:
    """Return an engine's loss of an answer's token, and the share of best tokens that are the first engine's."""
    sums, total = np.zeros((len(engines), 2)), 0
    for ids, begin in texts:
        wanted = None
        for i, engine in enumerate(engines):
            logits = engine.run(ids)[begin - 1 : -1].astype(np.float64)
            best = logits.argmax(1)
            wanted = best if wanted is None else wanted
            logits -= logits.max(1, keepdims=True)
            loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(logits)), ids[begin:]]
            sums[i] += loss.sum(), (best == wanted).sum()
        total += len(ids) - begin
    return sums / max(total, 1)


def _times(engines: list[Bundle | Gguf], counts: list[int], rounds: int) -> np.ndarray:
    """Return the seconds of passes over ``counts`` tokens [engines, counts], the fastest of all rounds."""
    times = np.full((len(engines), len(counts)), np.inf)
    known = min(engine.vocabulary for engine in engines)
    ids = np.random.default_rng(0).integers(3, known, PAST + max(counts, default=1))
    for _ in range(rounds if counts else 0):
        for i, engine in enumerate(engines):
            engine.run(ids[:PAST])
            for j, count in enumerate(counts):
                for _ in range(10):
                    begin = time.perf_counter()
                    engine.run(ids[PAST : PAST + count], PAST)
                    times[i, j] = min(times[i, j], time.perf_counter() - begin)
    return times


def _make(path: Path, bundle: Path) -> None:
    """Quantise the checkpoint of ``bundle``, a GGUF file, to the type that ``path`` is named after."""
    import llama_cpp

    source = locate(read_manifest(bundle).recipe.target, shipped_folder())
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{path.stem.rpartition('-')[2].upper()}")
    settings.allow_requantize = True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings)):
        raise SystemExit(f"llama.cpp cannot make {path} of {source}.")


if __name__ == "__main__":
    run(main)
