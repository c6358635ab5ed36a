"""A request in the service, the outputs that its listener receives, and its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from echo_trt.engine.output import OutputDelta, OutputProcessor
from echo_trt.engine.request import Request
from echo_trt.engine.service.protocol import FIRST

#: Ends that are errors -> their codes, gRPC statuses by name.
ERRORS = {"failed": "INTERNAL", "cancelled": "CANCELLED", "invalid": "INVALID_ARGUMENT"}


class Overloaded(Exception):
    """No request is taken now; another time or another server may. The message is one sentence."""


@dataclass(frozen=True)
class FinishInfo:
    """The end of a request.

    reason               stop, length, cancelled, deadline, failed or invalid (its grammar cannot be compiled); of a
                         probe also busy: no slot was free, and a finished iteration of other requests proves as much as
                         a token
    message              why the request failed or is invalid
    cached_tokens        prompt tokens that the prefix cache had
    drafted              draft tokens that were verified
    queue_seconds        from submission until the engine took the request; None: it never did
    first_token_seconds  from submission until the first token; None: it never came
    """

    reason: str
    message: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    verifications: int
    drafted: int
    queue_seconds: float | None
    first_token_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class RequestOutput(OutputDelta):
    """New output of a request, and with the last one its end. Tokens may precede their text.

    time  time.monotonic() at which the engine had them
    """

    time: float
    end: FinishInfo | None = None


@dataclass(eq=False)
class ServiceRequest:
    """A request on its way. Jobs are ordered as they are served: by priority, lowest first, then by arrival.

    deadline, submitted, taken, first_token  time.monotonic(); None: there is none, or it has not come
    failures                                 of the engine while this request was running, in a row
    """

    request: Request
    answer: OutputProcessor
    on_event: Callable[[RequestOutput], None]
    epoch: int
    deadline: float | None
    submitted: float
    taken: float | None = None
    first_token: float | None = None
    failures: int = 0

    @property
    def priority(self) -> int:
        """The request's priority; lower numbers are served first."""
        return self.request.priority

    @property
    def probe(self) -> bool:
        """Whether it only asks if the engine works."""
        return self.priority == FIRST and self.request.params.max_tokens == 1

    def __lt__(self, other: ServiceRequest) -> bool:
        return (self.priority, self.epoch) < (other.priority, other.epoch)
