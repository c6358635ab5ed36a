"""The name by which a bundle's config.json (``bundle.card``) is known from a checkpoint's."""

from __future__ import annotations

MODEL_TYPE = "echo"
