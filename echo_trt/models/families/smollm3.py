"""SmolLM3: Llama's network, where every fourth layer does not rotate query and key."""

from __future__ import annotations

from typing import Any

from echo_trt.errors import UserError
from echo_trt.models.families.family import Family, count


def _options(raw: dict[str, Any], layers: int, where: str) -> dict[str, Any]:
    """Read which layers do without rotary positions; GGUF files do not say it, and have every fourth."""
    rotated = raw.get("no_rope_layers")
    if rotated is None:
        step = count({"no_rope_layer_interval": 4, **raw}, "no_rope_layer_interval", where)
        rotated = [(i + 1) % step for i in range(layers)]
    if not isinstance(rotated, list) or len(rotated) < layers:
        raise UserError(
            f"{where}: no_rope_layers is {rotated!r}, not a list of {layers} layers; take the checkpoint's own "
            "config.json."
        )
    return {"unrotated_layers": tuple(i for i in range(layers) if not rotated[i])}


FAMILY = Family(
    name="smollm3",
    architecture="SmolLM3ForCausalLM",
    models="SmolLM3 3B",
    gguf="smollm3",
    interleaved=True,
    options=_options,
    sampling={"temperature": 0.6, "top_p": 0.95},
    tools="Hermes' JSON in `<tool_call>`, as text",
    thinking="yes, `enable_thinking`, or `/no_think` in the system prompt",
)
