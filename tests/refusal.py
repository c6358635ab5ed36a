"""How every mistake is answered: a UserError of one sentence that names what is wrong and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from echo_trt.errors import UserError


@contextmanager
def refused(*words: object, kind: type[Exception] = UserError) -> Iterator[None]:
    """Check that the block ends in a ``kind`` whose one sentence holds all ``words``."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert "\n" not in message
    assert message.endswith((".", "?"))
    assert not any(end in message for end in (". ", "? ", "..", ":.")), message
