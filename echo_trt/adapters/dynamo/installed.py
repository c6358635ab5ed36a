"""Whether NVIDIA Dynamo is installed, and in the version that this backend was tried with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from echo_trt.errors import UserError

VERSION = "1.6.1"
PACKAGES = ("ai-dynamo", "ai-dynamo-runtime")
REMEDY = f"pip install 'echo-trt[dynamo]' && pip install --no-deps ai-dynamo=={VERSION}"


def check_installed() -> None:
    """Refuse an environment without Dynamo, or with another version of it."""
    for package in PACKAGES:
        try:
            found = version(package)
        except PackageNotFoundError:
            raise UserError(f"{package} is not installed; install it: {REMEDY}.") from None
        if found != VERSION:
            raise UserError(f"{package} is {found}, but this backend is for {VERSION}; install that: {REMEDY}.")
