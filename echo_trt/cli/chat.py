"""``echo-trt chat``: a conversation in a terminal, whose turns the prefix cache keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from rich.console import Console

from echo_trt.cli.generate import PlainText, sampling_params
from echo_trt.cli.options import ChatOptions
from echo_trt.cli.progress import loading
from echo_trt.cli.terminal import wants_colour
from echo_trt.engine.llm import LLM
from echo_trt.engine.params import SamplingParams
from echo_trt.errors import UserError, encodable
from echo_trt.files.extras import of_lab, registered

COMMANDS = "/system TEXT sets the system prompt, /reset forgets the conversation, /bye ends"


def run(options: ChatOptions, out: Console, messages: Console) -> None:
    """Answer line by line until /bye or the end of the input."""
    coloured = wants_colour(out, options.color) and "text" in registered("generate")
    params = replace(sampling_params(options), token_sources=coloured)
    with loading(messages):
        memory, costs, batch = options.kv_cache_memory, options.costs, options.batch or 1
        llm = LLM(options.bundle, options.policy, batch, note=messages.print, kv_cache_memory=memory, costs=costs)
    messages.print(COMMANDS, highlight=False)
    system = encodable(options.system, "--system")
    turns: list[dict[str, str]] = []
    for line in _lines(out):
        command, _, rest = line.partition(" ")
        if command == "/bye":
            return
        if command in ("/reset", "/system"):
            turns, system = [], rest.strip() if command == "/system" else system
        elif command.startswith("/"):
            messages.print(COMMANDS, highlight=False)
        elif line:
            turns.append({"role": "user", "content": line})
            begin = [{"role": "system", "content": system}] * bool(system)
            try:
                turns.append({"role": "assistant", "content": _answer(llm, begin + turns, params, out)})
            except UserError as error:  # such as a conversation that is longer than the context
                del turns[-1]
                messages.print(f"{error} /reset begins anew.", highlight=False)


def _lines(out: Console) -> Iterator[str]:
    if out.is_terminal:
        import readline  # noqa: F401  # what it brings to input(): editing and earlier lines
    with suppress(EOFError):
        while True:
            yield input("> " * out.is_terminal).strip()


def _answer(llm: LLM, conversation: list[dict[str, str]], params: SamplingParams, out: Console) -> str:
    text = of_lab("generate", "text")() if params.token_sources else PlainText()
    for delta in llm.stream_chat(conversation, params):
        out.print(text.add(delta), end="", highlight=False, soft_wrap=True)
    out.print()
    answer: str = text.text
    return answer
