"""The numbers of the goodput policies."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class GoodputSettings:
    """How far a search may go; within these bounds it weighs costs against acceptance.

    max_depth        draft levels below the root
    beams            nodes of a level and request that are expanded
    width            children scored under each expanded node
    per_request      K_i, the most tokens verified of one request
    one_path         whether a request's draft is a chain, however many sources propose tokens
    free_candidates  whether copied text and n-grams join the head's candidates
    """

    max_depth: int
    beams: int
    width: int
    per_request: int
    one_path: bool = False
    free_candidates: bool = True

    def as_chain(self) -> GoodputSettings:
        """Return the same numbers for drafts that are chains."""
        return replace(self, beams=1, width=1, one_path=True)
