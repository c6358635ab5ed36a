"""Other engines on a bundle's target, to compare with: the same weights, precision, prompts and concurrency, greedy.

| peer                  | engine                                                                                |
|-----------------------|---------------------------------------------------------------------------------------|
| openvino-genai        | OpenVINO GenAI's continuous batching, plain decoding                                  |
| openvino-genai-eagle3 | the same, drafted by the bundle's EAGLE-3 head, in the bundle's precision: chains or, |
|                       | for one text, a tree, by a trial                                                      |
| transformers          | Hugging Face generate() on static batches, padded on the left: no continuous batching |
| NAME=URL, with #MODEL | a server of OpenAI's completions that runs already: vLLM, TensorRT-LLM, SGLang, ...   |
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from echo_trt.bundle.manifest import Manifest
from echo_trt.bundle.recipe import Source
from echo_trt.bundle.sources import locate
from echo_trt.errors import UserError, shown
from echo_trt.models.checkpoint import weights_sha256
from echo_trt.models.tokenizer import load_tokenizer
from echo_trt.speculation.policies import POLICIES
from echo_trt_lab.benchmark.peer import Peer

if TYPE_CHECKING:
    from echo_trt_lab.benchmark.peer_openai import Server

FLOATS = ("fp32", "bf16")


def open_peer(name: str, bundle: Path, manifest: Manifest, recipe_folder: Path = Path("build")) -> Peer:
    """Open the peer ``name`` for the target of ``bundle``, whose recipe's relative paths start in ``recipe_folder``.

    GenAI's networks are made at the first call and kept in echo-trt/peers below $XDG_CACHE_HOME (~/.cache).
    """
    check_peers([name])
    if "=" in name:
        from echo_trt_lab.benchmark.peer_openai import OpenAIPeer, Server

        return OpenAIPeer(Server.parse(name), load_tokenizer(bundle))
    precisions, opened = PEERS[name][2:]
    if manifest.precision not in precisions:
        raise UserError(
            f"bundle {bundle} is in {manifest.precision}, in which {name} does not run; "
            f"build it in {' or '.join(precisions)}."
        )
    return opened(manifest, recipe_folder)


def check_peers(names: Sequence[str]) -> None:
    """Refuse peers that are unknown, not installed, not reached, or not told apart."""
    inside = [name for name in names if "=" not in name]
    for name in inside:
        if name in SERVERS:
            raise UserError(
                f"peer {name} is a server in an environment of its own: pip install {name} there, start "
                f"{SERVERS[name]}, and give {name}=http://127.0.0.1:8000 (docs/measure.md)."
            )
        if name not in PEERS:
            raise UserError(f"peer {shown(name)} is unknown; use NAME=URL for a server, or one of {', '.join(PEERS)}.")
        _check_installed(name, *PEERS[name][:2])
    servers = _servers([name for name in names if "=" in name])
    for name, count in Counter([*inside, *(server.name for server in servers)]).items():
        if count > 1 or name in POLICIES:
            raise UserError(f"--peers gives a peer the name {shown(name)}, which is taken; give it a name of its own.")
    for server in servers:
        server.find_model()


def _servers(names: Sequence[str]) -> list[Server]:
    if not names:
        return []
    _check_installed(names[0], "httpx", "httpx")
    from echo_trt_lab.benchmark.peer_openai import Server

    return [Server.parse(name) for name in names]


def _check_installed(name: str, module: str, package: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise UserError(f"peer {name} needs a package that is not installed; run pip install {package}.")


def find_checkpoint(source: Source, recipe_folder: Path, digest: str) -> Path:
    """Find the checkpoint of a bundle and refuse another one; ``digest`` is the manifest's hash of the weights."""
    path = locate(source, recipe_folder)
    if weights_sha256(path) != digest:
        raise UserError(
            f"checkpoint {path} holds other weights than the bundle was built from; build the bundle again."
        )
    return path


def _open_genai(manifest: Manifest, recipe_folder: Path) -> Peer:
    from echo_trt_lab.benchmark.peer_genai import GenAI
    from echo_trt_lab.benchmark.peer_ir import target_ir

    target = find_checkpoint(manifest.recipe.target, recipe_folder, manifest.target_sha256)
    return GenAI("openvino-genai", manifest, target_ir(target, manifest))


def _open_genai_eagle3(manifest: Manifest, recipe_folder: Path) -> Peer:
    from echo_trt_lab.benchmark.peer_genai import GenAI
    from echo_trt_lab.benchmark.peer_ir import head_ir, target_ir

    draft = manifest.recipe.draft
    if draft.kind != "eagle3":
        raise UserError(f"bundle {manifest.name} has a draft of kind {draft.kind}; openvino-genai-eagle3 needs eagle3.")
    target = find_checkpoint(manifest.recipe.target, recipe_folder, manifest.target_sha256)
    head = find_checkpoint(draft.source, recipe_folder, manifest.draft_sha256)
    return GenAI("openvino-genai-eagle3", manifest, target_ir(target, manifest), head_ir(head, target, manifest))


def _open_transformers(manifest: Manifest, recipe_folder: Path) -> Peer:
    from echo_trt_lab.benchmark.peer_transformers import Transformers

    target = find_checkpoint(manifest.recipe.target, recipe_folder, manifest.target_sha256)
    return Transformers(manifest, target)


#: Packages that pin another PyTorch than echo-trt's, or may -> the server that they bring, a peer by its URL.
SERVERS = {"tensorrt-llm": "trtllm-serve", "vllm": "vllm serve", "sglang": "python -m sglang.launch_server"}
#: OpenVINO's packages work together in equal versions alone.
_GENAI = f"openvino-genai=={importlib.metadata.version('openvino')}"

#: name -> required module, its pip package, precisions of bundles, function that opens the peer
PEERS: dict[str, tuple[str, str, tuple[str, ...], Callable[[Manifest, Path], Peer]]] = {
    "openvino-genai": ("openvino_genai", _GENAI, (*FLOATS, "int8"), _open_genai),
    "openvino-genai-eagle3": ("openvino_genai", _GENAI, (*FLOATS, "int8"), _open_genai_eagle3),
    "transformers": ("transformers", "transformers", FLOATS, _open_transformers),
}
