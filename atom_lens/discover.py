"""Discovery: a folder imports all its modules, which register themselves, so that adding one takes one new file."""

from __future__ import annotations

import sys
from importlib import import_module
from pkgutil import walk_packages


def import_all(package: str) -> None:
    """Import every module of `package` and below, in alphabetical order."""
    for module in walk_packages(sys.modules[package].__path__, f"{package}."):
        import_module(module.name)
