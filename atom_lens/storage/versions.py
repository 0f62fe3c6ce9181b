"""Versions of everything that a result may depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def versions() -> dict[str, str]:
    """Versions of this package and of those that results depend on."""
    found = {"python": platform.python_version()}
    for package in ("atom-lens", "torch", "sae-lens", "transformer-lens", "nnsight", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
