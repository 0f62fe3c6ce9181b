"""Names of hook points: TransformerLens' own, for every backend, with globs and near matches."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    map_default_transformer_lens_config,
)

from atom_lens.errors import AtomLensError

# Hooks of almost every model, named first in error messages.
COMMON = ("hook_resid_post", "hook_mlp_out", "mlp.hook_post")


def layer_of(hook: str) -> int:
    """The layer of ``blocks.L....``."""
    match = re.match(r"blocks\.(\d+)\.", hook)
    if match is None:
        raise AtomLensError(f"hook {hook!r} is not in a layer, expected a name like 'blocks.9.hook_resid_post'")
    return int(match[1])


def expand_hooks(patterns: Sequence[str], available: Iterable[str], n_layers: int) -> list[str]:
    """Hook names that `patterns` (names or globs) match, in the model's order, each once.

    Raises:
        AtomLensError: a pattern matches nothing; the message holds the range of layers, or the nearest names.
    """
    names = list(available)
    known = set(names)
    found: dict[str, None] = {}
    if not patterns:
        raise AtomLensError("hooks is empty, expected at least one name like 'blocks.9.hook_resid_post'")
    for pattern in patterns:
        matches = [pattern] if pattern in known else fnmatch.filter(names, pattern)
        if not matches:
            layer = re.match(r"blocks\.(-?\d+)\.", pattern)
            if layer and not 0 <= int(layer[1]) < n_layers:
                raise AtomLensError(
                    f"hook {pattern!r} asks for layer {layer[1]}, the model has layers 0 to {n_layers - 1}"
                )
            near = difflib.get_close_matches(pattern, names, n=3) or [f"blocks.0.{name}" for name in COMMON]
            raise AtomLensError(f"hook {pattern!r} is not in this model, near are {', '.join(near)}")
        # A bridge sorts layers as text, so 10 would come before 2.
        for match in sorted(matches, key=layer_of):
            found[match] = None
    return list(found)


def component_hooks(block: Any, prefix: str = "") -> dict[str, str]:
    """Hook names below one TransformerLens block component: alias or name -> canonical name."""
    names = {f"{prefix}hook_in": f"{prefix}hook_in", f"{prefix}hook_out": f"{prefix}hook_out"}
    for child_name, child in block.submodules.items():
        names |= component_hooks(child, f"{prefix}{child_name}.")
    for alias, target in block.hook_aliases.items():
        for option in [target] if isinstance(target, str) else target:
            if f"{prefix}{option}" in names:
                names[f"{prefix}{alias}"] = f"{prefix}{option}"
                break
    return names


def module_sites(config: Any) -> tuple[dict[str, tuple[str, Literal["input", "output"]]], int, int]:
    """Where each hook of a transformers model is: hook name -> (module path, "input" or "output"); layers; context.

    TransformerLens' architecture adapters know the module behind every hook; no weights are loaded.

    Raises:
        AtomLensError: TransformerLens has no adapter for this architecture.
    """
    bridge_config = TransformerBridgeConfig.from_dict(dict(map_default_transformer_lens_config(config).__dict__))
    bridge_config.architecture = determine_architecture_from_hf_config(config)
    adapter = ArchitectureAdapterFactory.select_architecture_adapter(bridge_config)
    mapping: Mapping[str, Any] = adapter.get_component_mapping()
    sites: dict[str, tuple[str, Literal["input", "output"]]] = {}
    for layer in range(bridge_config.n_layers):
        for name, canonical in component_hooks(mapping["blocks"]).items():
            *parts, last = canonical.split(".")
            try:
                path = adapter.translate_transformer_lens_path(".".join(["blocks", str(layer), *parts]))
            except ValueError:  # a component without a module of its own
                continue
            sites[f"blocks.{layer}.{name}"] = (path, "input" if last == "hook_in" else "output")
    return sites, bridge_config.n_layers, bridge_config.n_ctx
