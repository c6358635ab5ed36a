"""Options of the API server that ``echo-trt serve`` has too, so that it refuses what the API server would."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from echo_trt.errors import UserError

LONGEST = 256  # characters of a name
ANY = "*"  # among the model's names: it may be called anything
_ORIGIN = re.compile(r"\*|https?://[^/\s@?#,]+")
_HOST = re.compile(r"\*|[^/\s@?#,:\[\]]+|\[[0-9a-f:.]+\]")


@dataclass(frozen=True, kw_only=True)
class ApiOptions:
    """How the OpenAI API is served. No ``served_model_names``: the default."""

    host: Annotated[str, Parameter(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    api_keys: Annotated[
        Path | None, Parameter(("--api-keys-file", "--api-keys"), help="Keys that the OpenAI API takes, one per line.")
    ] = None
    served_model_names: Annotated[
        tuple[str, ...],
        Parameter(
            "--served-model-name",
            help="What OpenAI clients call the model, * for any name; again for more.",
            show_default=False,
        ),
    ] = ()
    allowed_origins: Annotated[
        tuple[str, ...],
        Parameter(
            help="A web page's origin that may ask the OpenAI API, * for all; again for more.", show_default=False
        ),
    ] = ()
    allowed_hosts: Annotated[
        tuple[str, ...],
        Parameter(
            help="A name, beside localhost, by which the OpenAI API may be asked, * for any; again for more. Default: "
            "any, without --api-keys-file on a loopback address none.",
            show_default=False,
        ),
    ] = ()
    strict_fields: Annotated[
        bool, Parameter(negative="", help="Refuse every field of a request that is not known, instead of dropping it.")
    ] = False
    page: Annotated[
        bool, Parameter(negative="--no-page", help="Whether / of the OpenAI API's port shows the live page.")
    ] = True
    request_log: Annotated[
        bool, Parameter(negative="--no-request-log", help="Whether the log has a line for each answered request.")
    ] = True

    @property
    def api_words(self) -> list[str]:
        """These options, as the command line of another process has them."""
        words = [f"--host={self.host}", *(f"--served-model-name={name}" for name in self.served_model_names)]
        words += [f"--allowed-origins={origin}" for origin in self.allowed_origins]
        words += [f"--allowed-hosts={name}" for name in self.allowed_hosts]
        words += [f"--api-keys-file={self.api_keys}"] if self.api_keys else []
        words += [] if self.request_log else ["--no-request-log"]
        words += ["--strict-fields"] if self.strict_fields else []
        return words if self.page else [*words, "--no-page"]

    @property
    def hosts(self) -> tuple[str, ...] | None:
        """Names beside this machine's that a request's Host may have; None: any.

        A server on loopback without keys serves this machine alone, and a page of any site can have a name of its own
        lead there.
        """
        loopback = self.host == "localhost" or self.host.startswith("127.") or self.host == "::1"
        return self.allowed_hosts if self.allowed_hosts or (loopback and not self.api_keys) else None


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names of the model, without those given twice. Raises UserError."""
    for name in names:
        if not name or len(name) > LONGEST or not name.isprintable() or " " in name:
            raise UserError(
                f"--served-model-name is {name[:LONGEST]!a}; give 1 to {LONGEST} characters that can be printed, "
                "without blanks."
            )
    return tuple(dict.fromkeys(names))


def checked_hosts(hosts: Sequence[str] | None) -> tuple[str, ...] | None:
    """Names of a Host header, in lower case. Raises UserError."""
    for host in hosts or ():
        if not _HOST.fullmatch(host.lower()):
            raise UserError(
                f"--allowed-hosts is {host[:LONGEST]!a}; give a name without a scheme and a port, such as "
                "llm.example.com, or * for any."
            )
    return None if hosts is None else tuple(host.lower() for host in hosts)


def checked_origins(origins: Sequence[str]) -> tuple[str, ...]:
    """Of web pages that may ask. Raises UserError."""
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise UserError(
                f"--allowed-origins is {origin[:LONGEST]!a}; give a scheme and a host, such as https://example.com, or "
                "* for all."
            )
    return tuple(origins)
