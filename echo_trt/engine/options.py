"""Options of commands: a frozen dataclass is a command line. ``command`` makes one of it for cyclopts.

Fields before ``KW_ONLY`` are given by position, the others as ``--name``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from cyclopts import App, CycloptsError, Parameter, Token

from echo_trt.engine.params import MAX_AT_ONCE
from echo_trt.errors import UserError, no_memory
from echo_trt.files.log import tell_mistake

#: Of options: a flag has no opposite of its own, and where an option is repeated its last value counts.
DEFAULTS = Parameter(negative=(), allow_repeating=True)


def command(run: Callable[[Any], int | None]) -> Callable[..., int | None]:
    """Wrap a function of one dataclass as a function of the dataclass's fields, which cyclopts turns into options."""
    [kind] = [hint for name, hint in get_type_hints(run).items() if name != "return"]

    @wraps(run)
    def call(*words: Any, **options: Any) -> int | None:
        return run(kind(*words, **options))

    parameters = [
        field if field.kind is field.KEYWORD_ONLY else field.replace(kind=field.POSITIONAL_ONLY)
        for field in inspect.signature(kind).parameters.values()
    ]
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = get_type_hints(kind, include_extras=True)
    paragraphs = inspect.cleandoc(run.__doc__ or "").split("\n\n")
    call.__doc__ = "\n\n".join(" ".join(text.split()) for text in paragraphs)  # as wide as the terminal
    return call


def run_alone(run: App | Callable[..., Any], about: str | None = None) -> None:
    """Run a process's only command, or the commands of an App; a user's mistake is one sentence and exit code 2."""
    app = run
    if not isinstance(app, App):
        app = App(help=about, help_flags=["--help", "-h"], version_flags=[], default_parameter=DEFAULTS)
        app.default(run)
    try:
        app(sys.argv[1:], exit_on_error=False, print_error=False)
    except (UserError, CycloptsError, MemoryError, RuntimeError) as error:
        mistake = error if isinstance(error, UserError | CycloptsError) else no_memory(error)
        if not mistake:
            raise
        tell_mistake(mistake)
        sys.exit(2)


def bounds(low: float, high: float | None = None) -> Callable[[object, Any], None]:
    """Make a validator of numbers; None is let through."""
    reported = f"{low:,} or more" if high is None else f"{low:,} to {high:,}"

    def check(_: object, value: Any) -> None:
        if value is not None and not (low <= value and (high is None or value <= high)):
            raise ValueError(f"Give {reported}.")

    return check


def _bytes(_: object, tokens: Sequence[Token]) -> int:
    from echo_trt.engine.host_memory import OPTION, bytes_in

    return bytes_in(OPTION, tokens[0].value)


def _store_size(_: object, tokens: Sequence[Token]) -> str:
    from echo_trt.engine.host_memory import bytes_in

    bytes_in("--store-size", tokens[-1].value)
    return tokens[-1].value


def _load_policies(_: object, tokens: Sequence[Token]) -> Path:
    """Register the policies of a file before any command looks for one. Raises UserError."""
    from echo_trt.speculation.policies import load_policies

    file = Path(tokens[0].value)
    load_policies(file)
    return file


Bundle = Annotated[
    Path, Parameter(help="A folder that echo-trt build made; chat, generate and serve take a GGUF file, too.")
]
BatchSize = Annotated[
    int | None, Parameter(help="Requests running at once. Default: the recipe's.", validator=bounds(1, MAX_AT_ONCE))
]
Port = Annotated[int, Parameter(validator=bounds(1, 65535))]
PolicyFile = Annotated[
    Path | None, Parameter(help="A Python file with policies of your own.", converter=_load_policies)
]
KVCacheMemory = Annotated[
    int | None,
    Parameter(
        metavar="GIB",
        converter=_bytes,
        help="Memory of the KV pool in GiB, or such as 512M. Default: the recipe's, else enough for the batch, on a "
        "CPU up to half of the free memory.",
    ),
]
Flag = Annotated[bool, Parameter(show_default=False)]  # off where it is not given
LogFormat = Annotated[Literal["text", "json"], Parameter(help="How the log is written: lines of text, or of JSON.")]
CostsFile = Annotated[
    Path | None,
    Parameter(
        metavar="FILE",
        help="File, or folder of the file, that keeps what passes cost on this machine. Default: costs.json in the "
        "bundle.",
    ),
]
DrainSeconds = Annotated[
    int, Parameter("--drain-timeout", help="Seconds that SIGTERM waits for requests in flight.", validator=bounds(1))
]
StoreFolder = Annotated[
    Path | None,
    Parameter(
        metavar="DIR",
        help="Keep the prefix cache and what was learnt in this folder, for later starts: users' text on a disk.",
    ),
]
StoreSize = Annotated[
    str,
    Parameter(metavar="GIB", converter=_store_size, help="Disk space of the store, GiB or such as 512M. Default: 8G."),
]
LearnAnswers = Annotated[
    Flag, Parameter(help="Draft from the server's earlier answers, those to the same API key; policy goodput.")
]
SpecialTokens = Annotated[
    Flag,
    Parameter(help="Take <|im_end|> and the like in a message for the control token. Default: for text."),
]


@dataclass(frozen=True)
class EngineOptions:
    """How to open a bundle; None stands for the recipe's value. ``kv_cache_memory``: bytes of the KV pool."""

    bundle: Bundle
    _: KW_ONLY
    policy: Annotated[str | None, Parameter(help="How to speculate. Default: the recipe's.")] = None
    policy_file: PolicyFile = None
    batch: BatchSize = None
    kv_cache_memory: KVCacheMemory = None
    costs: CostsFile = None


def _classes(_: object, tokens: Sequence[Token]) -> str:
    from echo_trt.engine.latency import LatencyClasses

    LatencyClasses(tokens[-1].value)
    return tokens[-1].value


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(EngineOptions):
    """How a service keeps latency targets, and what it learns and keeps."""

    latency_classes: Annotated[
        str,
        Parameter(
            metavar="NAME=TTFT/TPOT",
            converter=_classes,
            help="Latency targets in ms by names that requests and keys give, such as interactive=300/25,batch.",
        ),
    ] = ""
    learn_answers: LearnAnswers = False
    store: StoreFolder = None
    store_size: StoreSize = ""

    def __post_init__(self) -> None:
        if self.store_size and self.store is None:
            raise UserError(f"--store-size is {self.store_size}, but there is no store; add --store DIR.")
        if self.store and self.store.exists() and not self.store.is_dir():
            raise UserError(f"--store is {self.store}, which is a file; name a folder.")


def _events(_: object, tokens: Sequence[Token]) -> str:
    from echo_trt.engine.service.kv_events import read_config

    read_config(tokens[-1].value)
    return tokens[-1].value


@dataclass(frozen=True, kw_only=True)
class HostedOptions(LatencyOptions):
    """How an engine's host serves, with Triton or without."""

    queue: Annotated[int, Parameter(help="Requests that may wait; more are refused.", validator=bounds(1))] = 256
    special_tokens_in_content: SpecialTokens = False
    no_prefix_cache: Annotated[Flag, Parameter(help="Share no KV blocks among texts that begin alike.")] = False
    kv_events_config: Annotated[
        str,
        Parameter(
            metavar="JSON",
            converter=_events,
            help="Publish over ZMQ what the prefix cache holds, as vLLM does: endpoint, topic, replay_endpoint and "
            "others of its fields.",
        ),
    ] = ""

    @property
    def given(self) -> dict[str, str]:
        """The options of an engine's host but ``bundle``, as text for another process."""
        found = {field.name: getattr(self, field.name) for field in fields(HostedOptions) if field.name != "bundle"}
        if self.kv_cache_memory is not None:
            found["kv_cache_memory"] = f"{self.kv_cache_memory}B"
        texts = {name: value.resolve() if isinstance(value, Path) else value for name, value in found.items() if value}
        return {name.replace("_", "-"): "true" if value is True else str(value) for name, value in texts.items()}

    @property
    def words(self) -> list[str]:
        """These options, as the command line of another process has them."""
        return [f"--{name}={value}" for name, value in self.given.items()]
