"""What the tests of images, compose files and manifests read of them, and what every service and pod must be."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
KUBERNETES = "1.34"


class Compose(yaml.SafeLoader):
    """YAML with Compose's own tag for what replaces a list where it would be added to it."""


Compose.add_constructor("!override", lambda loader, node: loader.construct_sequence(node))


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.load_all((DOCKER / name).read_text(), Compose))


def entrypoint(dockerfile: str) -> list[str]:
    """Return the words with which an image's command begins; a manifest with a command of its own replaces them."""
    [line] = [x for x in (DOCKER / dockerfile).read_text().splitlines() if x.startswith("ENTRYPOINT ")]
    return json.loads(line.removeprefix("ENTRYPOINT "))


def pinned(image: str) -> bool:
    tag = image.partition("@")[0].rpartition("/")[2].partition(":")[2]
    return bool(re.search(r"\d+\.\d+", tag))


def requirements(name: str) -> dict[str, str]:
    """Package -> its version, of a file that pins all of them."""
    lines = (DOCKER / f"requirements-{name}.txt").read_text().splitlines()
    packages = [line for line in lines if line and not line.startswith(("#", "--"))]
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.+]+", line) for line in packages)
    return dict(line.split("==") for line in packages)


def options_in(words: Sequence[str]) -> set[str]:
    return {word for word in words if word.startswith("--")}


def check_services(services: dict[str, dict[str, Any]]) -> None:
    """Every service of a compose file is hardened, and what it mounts from here exists."""
    for name, service in services.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        image = re.sub(r"^\$\{IMAGE:-(.+)\}$", r"\1", service["image"])
        assert image.startswith("echo-trt:") or pinned(image), name
        for port in service.get("ports", []):
            assert re.match(r"(\$\{ADDRESS:-)?127\.0\.0\.1\b", port), "who wants it open says so"
        for volume in service.get("volumes", []):
            source = volume.partition(":")[0]
            assert not source.startswith("./") or (DOCKER / source).exists(), source


def check_pod(pod: dict[str, Any]) -> None:
    """Check that a pod is hardened and that its containers mount what it has."""
    assert pod["securityContext"]["runAsNonRoot"] is True
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
