"""MkDocs' hooks: files beside docs/ that are linked to join the site; nothing comes from other hosts."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)")
FOREIGN = re.compile(r"<(?:script|img|iframe|link rel=.?(?:style|preconn)\S*)[^>]*(?:src|href)=\"?(?:https?:)?//")
log = logging.getLogger("mkdocs.hooks.docs")


def on_files(files: Files, config: Any) -> Files:
    """Add files of the repository that are linked to: pages as pages, others as they are."""
    waiting = [file for file in files if file.src_uri.endswith(".md")]
    while waiting:
        page = waiting.pop()
        for found in LINK.findall(Path(page.abs_src_path).read_text()):
            target = _target(page, found)
            if not target.startswith("docs/") and (ROOT / target).is_file() and not files.get_file_from_path(target):
                files.append(file := File.generated(config, target, abs_src_path=str(ROOT / target)))
                waiting += [file] * target.endswith(".md")
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn paths of the repository into paths of the site, whose root is docs/."""

    def moved(match: re.Match[str]) -> str:
        return os.path.relpath(_target(page.file, match[0]).removeprefix("docs/"), os.path.dirname(page.file.src_uri))

    return LINK.sub(moved, markdown)


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Warn, which ends a strict build, where a page would load something from another host."""
    for found in FOREIGN.findall(output):
        log.warning("%s loads from another host: %s", page.file.src_uri, found)
    return output


def _target(page: File, link: str) -> str:
    """Return the path in the repository that a page's link means."""
    inside = Path(page.abs_src_path).is_relative_to(ROOT / "docs")
    return os.path.normpath(Path("docs" if inside else "", page.src_uri).parent / link)
