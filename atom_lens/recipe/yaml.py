"""YAML as people mean it: no repeated keys, and scalars as in YAML 1.2."""

from __future__ import annotations

import re
from typing import Any

import yaml
from typing_extensions import override

from atom_lens.errors import AtomLensError

# YAML 1.1, which PyYAML reads, takes `no` for false, 010 for 8, 1:30 for 90, 2026-01-02 for a date, and 1e-3 for text.
_SCALARS = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    "float": (
        r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}

    @override
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":  # merged keys may be overridden
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise yaml.YAMLError(f"key {key.value!r} is given twice, the second time in line {line}")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes scalars that either version would read as something else."""


for _tag, (_pattern, _first) in _SCALARS.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str) -> Any:
    """The content of a YAML document.

    Raises:
        AtomLensError: it is not YAML, repeats a key, or is nested too deep.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise AtomLensError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise AtomLensError("it is nested too deep") from error


def write_yaml(data: Any) -> str:
    """A YAML document that `read_yaml`, and readers of YAML 1.1, read back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
