"""The command line. A command's options are a dataclass; the commands of other packages are found by entry points."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from importlib.metadata import entry_points
from pathlib import Path

from cyclopts import App

from echo_trt import __version__
from echo_trt.adapters.dynamo.options import WorkerOptions
from echo_trt.cli.options import BuildOptions, ChatOptions, GenerateOptions
from echo_trt.cli.terminal import Screen, messages, run_app, screen_of
from echo_trt.engine.options import DEFAULTS, command
from echo_trt.errors import UserError
from echo_trt.files.extras import BUILD, check_modules, of_lab, registered
from echo_trt.files.inputs import is_gguf
from echo_trt.supervision.options import ServeOptions

SEAL = "manifest.sha256"  # of the copy of a GGUF file, in its folder

app = App(
    name="echo-trt",
    help="Elastic speculative decoding (ECHO, arXiv 2604.09603), compiled.\n\n"
    "`echo-trt build RECIPE` makes a bundle, `echo-trt generate BUNDLE` answers with it, "
    "and `--compare` shows what speculation is worth.",
    version=f"echo-trt {__version__}",
    help_flags=["--help", "-h"],
    version_flags=["--version"],
    help_format="plaintext",
    default_parameter=DEFAULTS,
)


def main() -> None:
    """Run the command; a user's mistake is one sentence on stderr and exit code 2."""
    if sys.argv[1:] in ([], ["--help"]):
        app.resolved_commands()  # whose first sentences are shown
    run_app(app)


@app.command(sort_key=0)
@command
def build(options: BuildOptions) -> None:
    """Compile a target and its draft into a bundle.

    A model's name finds the shipped recipe for it, or one is derived. Weights are fetched once into the hub's cache.

    The bundle is checked against the reference, and appears whole or not at all. It replaces one of its name.

    Examples: `echo-trt build build/smollm2-135m.yaml -o bundles/smollm2-135m`,
    `echo-trt build Qwen/Qwen3-8B --draft AngelSlim/Qwen3-8B_eagle3 --engine torch --gpu-memory-utilization 0.9`
    """
    from echo_trt.backends.kind import TORCH
    from echo_trt.cli.progress import BuildProgress

    check_modules("a build", (*BUILD, *TORCH), "build")
    from echo_trt.cli.recipes import for_this_machine, recipe_for, sized

    found, path = recipe_for(options.model, options.draft)  # a mistyped name costs no import of torch
    if options.random_weights:
        found = of_lab("build", "random_weights")(found)
    settings, why = for_this_machine(options.model, found, path, options.engine, options.precision)
    settings = sized(settings, path, options)
    folder = options.output or Path("bundles") / settings.name
    with BuildProgress(messages) as progress:
        from echo_trt.cli.build import build as run

        if why:
            progress.stage(f"engine {settings.engine}: {why} (--engine takes another)")
        manifest = run(settings, path, folder, progress.stage, progress.detail)
    with_table = "table" in registered("build")
    Screen().print(
        of_lab("build", "table")(manifest, folder) if with_table else f"bundle {folder}: {manifest.sentence}"
    )


@app.command(sort_key=1)
@command
def generate(options: GenerateOptions) -> None:
    """Answer prompts with a bundle or a GGUF file; text streams as it comes.

    On a terminal a token's colour tells who proposed it, and the last line what the colours mean.

    Examples: `echo-trt generate bundles/smollm2-135m "Why is the sky blue?"`,
    `echo-trt generate bundles/smollm2-135m --prompts prompts.jsonl --batch 8 --json answers.json`
    """
    if not options.bundle.exists():  # refused before the engine is imported, which takes seconds
        from echo_trt.bundle.manifest import read_manifest

        read_manifest(options.bundle)
    options = replace(options, bundle=_bundle_of(options.bundle))
    from echo_trt.cli.progress import loading

    with loading(messages):
        from echo_trt.cli.generate import run

    run(options, screen_of(options.color), messages)


@app.command(sort_key=2)
@command
def chat(options: ChatOptions) -> None:
    """Chat with a bundle or a GGUF file in the terminal; what was said before is kept in the prefix cache.

    `/system TEXT` sets the system prompt, `/reset` forgets the conversation, `/bye` ends.

    Example: `echo-trt chat bundles/smollm2-135m --temperature 0`
    """
    options = replace(options, bundle=_bundle_of(options.bundle))
    from echo_trt.cli.progress import loading

    with loading(messages):
        from echo_trt.cli.chat import run

    run(options, screen_of(options.color), messages)


@app.command(sort_key=3)
@command
def serve(options: ServeOptions) -> int:
    """Serve a bundle by OpenAI's API; with Triton Inference Server beside it, or with several workers of Dynamo.

    Prints where it listens once a real answer has come. What dies starts again. SIGTERM lets requests in flight finish.

    Example: `echo-trt serve bundles/smollm2-135m`
    """
    options = replace(options, bundle=_bundle_of(options.bundle))
    if options.replicas:
        from echo_trt.adapters.dynamo.replicas import run as run_replicas

        return run_replicas(options)
    from echo_trt.cli.serve import run

    return run(options)


def _bundle_of(path: Path) -> Path:
    """Return the bundle to serve; a GGUF file's is made where the cache has no whole one of the file as it is now."""
    if not is_gguf(path):
        return path
    from echo_trt.bundle.manifest import MANIFEST, sha256
    from echo_trt.bundle.sources import cache_folder
    from echo_trt.cli.recipes import SERVED

    stat = path.stat()
    facts = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {__version__}"
    folder = cache_folder() / f"{path.stem}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}"
    if not _is_whole(folder):
        if os.path.lexists(folder):
            messages.print(f"{folder} is damaged; it is made anew from {path}.")
            (shutil.rmtree if folder.is_dir() and not folder.is_symlink() else os.unlink)(folder)
        words = ["build", str(path), "-o", str(folder)]
        words += [f"--{name.replace('_', '-')}={value}" for name, value in SERVED.items()]
        # In a process of its own, whose memory a server does not keep.
        if code := subprocess.run([sys.executable, "-m", "echo_trt", *words], check=False).returncode:
            sys.exit(code)
        (folder / SEAL).write_text(sha256(folder / MANIFEST))
    return folder


def _is_whole(folder: Path) -> bool:
    """Whether a copy is as it was built: its manifest has the hashes of the other files, and SEAL the manifest's."""
    from echo_trt.bundle.manifest import MANIFEST, read_manifest, sha256, verify_files

    with suppress(OSError, UserError):
        manifest, seal = read_manifest(folder), folder / SEAL
        if seal.is_file() and seal.read_bytes() == sha256(folder / MANIFEST).encode():
            verify_files(folder, manifest)
            return True
    return False


@app.command(sort_key=4)
@command
def worker(options: WorkerOptions) -> int:
    """Serve a bundle as a worker of NVIDIA Dynamo, whose frontend finds it.

    Dynamo's own settings are environment variables. SIGTERM lets requests in flight finish; unfinished ones continue
    at other workers.

    Example: `echo-trt worker bundles/smollm2-135m --system-port 9191`
    """
    from echo_trt.adapters.dynamo.command import run

    return run(options)


app.command("echo_trt.cli.store:app", name="store", sort_key=4)

for entry in entry_points(group="echo_trt.commands"):  # echo_trt_lab's
    app.command(entry.value, name=entry.name)  # imported where it is run


if __name__ == "__main__":
    main()
