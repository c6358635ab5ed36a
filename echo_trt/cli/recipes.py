"""A recipe for a model that is named, by an id of the hub, a folder or a GGUF file: a shipped one, or one derived."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

from echo_trt.backends.kind import EngineKind, built_as, engine_kind, engine_kinds
from echo_trt.bundle.read_recipe import load_recipe, parse_recipe
from echo_trt.bundle.recipe import HUB, Recipe
from echo_trt.bundle.sources import CONFIG, from_hub
from echo_trt.cli.options import BuildOptions
from echo_trt.engine.drafters.kind import draft_kinds
from echo_trt.errors import UserError
from echo_trt.files.extras import extra, registered
from echo_trt.files.inputs import is_gguf

RECIPES = Path(__file__).parents[2] / "build"  # of the repository
PACKAGED = Path(__file__).parents[1] / "recipes"  # of the wheel
#: What the names of GGUF files end in: the type of the weights.
GGUF = re.compile(r"([-.](UD-)?(I?Q\d\w*|B?F16|F32))?(-\d{5}-of-\d{5})?\.gguf$", re.IGNORECASE)
CONTEXT = 8192  # of a derived recipe, at most; larger: more KV blocks per request
#: How ``serve`` builds a GGUF file, which ``inspect`` shows where no option is given: blocks of the file stay as they
#: are. More requests at once take a larger KV pool.
SERVED: dict[str, Any] = {"precision": "int4", "max_num_seqs": 8}


def recipe_for(what: str, draft: str | None = None) -> tuple[Recipe, Path]:
    """Return the recipe, and the folder that its paths are relative to.

    what    a recipe's file, or a shipped one's name; an id of the hub, OWNER/NAME; or a checkpoint, a folder or .gguf
    draft   an id or a checkpoint of the draft, for another one than the recipe's
    """
    path = Path(what).expanduser()
    if _is_recipe(path):
        recipe, folder = load_recipe(path), path.parent
        return (_with_draft(recipe, draft) if draft else recipe), folder
    named = shipped_folder() / f"{what}.yaml"
    if named.is_file() and not path.exists():
        recipe = load_recipe(named)
        head = recipe.draft.source.path if recipe.draft.source and not draft else None
        if recipe.target.wheel and named.parent == PACKAGED and head and not (PACKAGED / head).exists():
            raise UserError(f"recipe {what} has a head that comes with echo-trt-lab; run pip install ./lab.")
        recipe = _with_draft(recipe, draft) if draft else _for_these_weights(recipe, named.parent)
        return recipe, named.parent
    target = source_of(what)
    shipped = _shipped(target, draft)
    if shipped is None:
        return _derived(target, draft), Path()
    recipe = load_recipe(shipped)
    recipe = recipe.model_copy(update={"target": recipe.target.model_copy(update={"hub": None, **target})})
    recipe = _with_draft(recipe, draft) if draft else _for_these_weights(recipe, shipped.parent)
    return recipe, shipped.parent


def _is_recipe(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") or (path.is_file() and not is_gguf(path))


def source_of(what: str) -> dict[str, str]:
    """Return the keys of a ``Source`` for an id of the hub or a local checkpoint."""
    if Path(what).expanduser().exists():
        return {"path": str(Path(what).expanduser().resolve())}
    if re.fullmatch(HUB, what) and not GGUF.search(what) and not Path(what).parent.is_dir():
        return {"hub": what}
    shipped = sorted(path.stem for path in shipped_folder().glob("*.yaml"))
    near = difflib.get_close_matches(what.lower(), shipped, 3, 0.5)
    raise UserError(
        f"{what} is neither a recipe, a checkpoint's folder or GGUF file, nor an id of the hub such as Qwen/Qwen3-8B; "
        + (f"did you mean {' or '.join(near)}?" if near else f"name one, or a shipped recipe: {', '.join(shipped)}.")
    )


def shipped_folder() -> Path:
    """Return the folder of the shipped recipes: with the heads that they name, but for the server's wheel."""
    if RECIPES.is_dir() or "folder" not in registered("recipes"):
        return RECIPES if RECIPES.is_dir() else PACKAGED
    folder: Path = extra("recipes", "folder")
    return folder


def for_this_machine(
    what: str, recipe: Recipe, folder: Path, engine: str | None, precision: str | None
) -> tuple[Recipe, str]:
    """Return a recipe with what is named on the command line, and why its engine is taken; "" where it is named.

    An engine that a recipe's file names is kept. One of a recipe that was found for ``what``, a name, is left where it
    does not suit this machine, or does not have ``precision``.
    """
    named, kind = built_as(recipe, engine, precision), engine_kind(engine or recipe.engine)
    suits = _is_recipe(Path(what).expanduser()) or (kind.suits and (not precision or precision in kind.precisions))
    if engine or ("engine" in recipe.model_fields_set and suits):
        return named, ""
    kind = usual_engine(named, folder)
    return built_as(named, kind.name, None), kind.preference[1]


def usual_engine(recipe: Recipe, folder: Path) -> EngineKind:
    """Return the engine that is taken on this machine where nobody names one.

    Of those that refuse nothing of the recipe it is the most preferred one; where all refuse, of all.
    """
    from echo_trt.cli.build_checks import check_engine
    from echo_trt.models.read_config import decoder_config
    from echo_trt.sizing.shapes import config_of

    kinds = sorted((kind for kind in engine_kinds() if kind.suits), key=lambda kind: -kind.preference[0])
    try:
        config = decoder_config(*config_of(recipe.target, folder))
    except UserError:  # told where the checkpoint is opened
        config = None
    for kind in kinds:
        try:
            check_engine(built_as(recipe, kind.name, None), config, kind)
        except UserError:
            continue
        return kind
    return kinds[0]


def _shipped(target: dict[str, str], draft: str | None) -> Path | None:
    """Find the shipped recipe of a target, by its name on the hub or its file's, or by the one that stands in the file.

    A draft's own one comes first.
    """
    file, found = Path(target.get("path", "")), []
    recipes = {path: load_recipe(path) for path in sorted(shipped_folder().glob("*.yaml"), key=lambda p: len(p.name))}
    for name in (lambda: GGUF.sub("", file.name), lambda: _stated_name(file)):
        known = target.get("hub") or _plain(name())
        for path, recipe in recipes.items():
            hub = recipe.target.hub
            if hub and known in (hub, _plain(hub.split("/")[1])):
                source = recipe.draft.source
                found.append((draft is None or (bool(source) and source.hub != draft), path))
        if found:
            return min(found, key=lambda entry: entry[0])[1]
    return None


def _plain(name: str) -> str:
    """Return a model's name as names of files have it."""
    return re.sub("[^a-z0-9.]+", "-", name.lower()).removesuffix("-gguf")


def _stated_name(file: Path) -> str:
    """Return the model's name that stands in a GGUF file, whatever the file is called, as Ollama's are."""
    try:
        return str(_config({"path": str(file)})["_name_or_path"]) if is_gguf(file) else ""
    except UserError:  # told where the checkpoint is read
        return ""


def _for_these_weights(recipe: Recipe, folder: Path) -> Recipe:
    """Leave a shipped head and its table out where they are not there, or were trained for another file's weights."""
    head, target = recipe.draft.source and recipe.draft.source.path, recipe.target.path
    if not head or recipe.target.wheel:
        return recipe
    config = folder / head / "config.json"
    if target and config.exists():
        from echo_trt.models.checkpoint import read_json, weights_sha256

        if read_json(config).get("target_sha256") == weights_sha256(Path(target)):
            return recipe
    draft = recipe.draft.model_dump(exclude={"source", "ngrams", "precision", "block"}) | {"kind": "lookup"}
    whole = recipe.model_dump(exclude_unset=True) | {"draft": draft, "calibration": None}
    return parse_recipe(whole, f"{recipe.name} without its head")


def _with_draft(recipe: Recipe, draft: str) -> Recipe:
    source = source_of(draft)
    if recipe.draft.source and recipe.draft.source.hub == source.get("hub", ""):
        return recipe
    raw = recipe.draft.model_dump(exclude={"block", "ngrams", "precision"})
    raw |= {"kind": _kind(source, draft), "source": source}
    whole = recipe.model_dump(exclude_unset=True) | {"draft": raw, "calibration": None}
    return parse_recipe(whole, f"{recipe.name} with draft {draft}")


def _derived(target: dict[str, str], draft: str | None) -> Recipe:
    name = Path(target.get("path") or target["hub"]).name
    raw: dict[str, Any] = {
        "name": re.sub(r"[^a-z0-9._-]", "-", name.lower().removesuffix(".gguf")),
        "target": target,
        "draft": {"kind": "mtp" if _has_mtp(target) else "lookup"},
        "limits": {"batch": 64, "context": _context(target)},
        "decoding": {"max_depth": 8, "beams": 4, "width": 8, "static": {"depth": 6, "top_k": 4, "tokens": 16}},
    }
    if draft:
        source = source_of(draft)
        raw["draft"] = {"kind": _kind(source, draft), "source": source}
    return parse_recipe(raw, f"the recipe for {name}")


def _context(target: dict[str, str]) -> int:
    """Return the context of a derived recipe. A target of no known family is refused here, before it is fetched."""
    from echo_trt.models.read_config import decoder_config

    config = decoder_config({**_config(target), "quantization_config": None}, target.get("path") or target["hub"])
    return min(config.max_position, CONTEXT)


def _has_mtp(target: dict[str, str]) -> bool:
    """Tell whether a checkpoint that is here has an MTP head."""
    from echo_trt.models.open_checkpoint import open_checkpoint

    try:
        return "path" in target and "mtp.fc.weight" in open_checkpoint(Path(target["path"])).names()
    except UserError:  # told where the checkpoint is read
        return False


def _kind(source: dict[str, str], name: str) -> str:
    """Tell a draft's kind from its configuration."""
    raw = _config(source)
    for kind in draft_kinds():
        if kind.knows(raw):
            return kind.name
    raise UserError(
        f"draft {name}: architectures is {raw.get('architectures')}, which is no draft that echo-trt knows; give an "
        "EAGLE-3 head, a block drafter or a smaller model."
    )


def _config(source: dict[str, str]) -> dict[str, Any]:
    """Read config.json, before weights are fetched."""
    from echo_trt.models.checkpoint import read_json
    from echo_trt.models.open_checkpoint import open_checkpoint

    folder = Path(source["path"]) if "path" in source else from_hub(source["hub"], CONFIG)
    return open_checkpoint(folder).config if folder.is_file() else read_json(folder / "config.json")


def sized(recipe: Recipe, folder: Path, options: BuildOptions) -> Recipe:
    """Return the recipe with the limits that are on the command line. ``folder``: that its paths are relative to."""
    from echo_trt.sizing.limits import filling, limited, with_kv_cache

    memory, utilization = options.kv_cache_memory, options.gpu_memory_utilization
    recipe = limited(recipe, options.max_model_len, options.max_num_seqs)
    if memory is not None:
        if utilization is not None:
            raise UserError("--gpu-memory-utilization and --kv-cache-memory both size the KV pool; give one of them.")
        return with_kv_cache(recipe, folder, memory)
    if utilization is None:
        return recipe
    if engine_kind(recipe.engine).card is None:
        raise UserError(f"--gpu-memory-utilization is for a GPU, but the engine is {recipe.engine}; leave it out.")
    import torch

    from echo_trt.backends.cuda.device import compute_capability, cuda_device

    device = cuda_device()
    card = torch.cuda.get_device_properties(device)
    return filling(recipe, folder, card.total_memory, utilization, card.name, compute_capability(device))
