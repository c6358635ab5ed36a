"""echo-trt: ECHO speculative decoding (arXiv 2604.09603) as a compiled deployment pipeline.

``from echo_trt import LLM, SamplingParams, Completion, UserError`` is the public face; networks load where they are
first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from echo_trt.engine.llm import LLM
    from echo_trt.engine.params import Completion, SamplingParams
    from echo_trt.errors import UserError

#: Public name -> its module.
_MODULES = {
    "LLM": "engine.llm",
    "Completion": "engine.params",
    "SamplingParams": "engine.params",
    "UserError": "errors",
}
__all__ = ["LLM", "Completion", "SamplingParams", "UserError"]
__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for: the engines behind ``LLM`` take seconds to import."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
