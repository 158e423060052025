"""YAML that people write."""

from __future__ import annotations

from typing import Any

import yaml

from kairos.errors import UserError


class _Loader(yaml.SafeLoader):
    """A key that is there twice is refused: YAML's own reader would take the last and say nothing."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            if key.value in seen:
                raise UserError(f"the key {key.value!r} is there twice, at line {key.start_mark.line + 1}")
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def load_yaml(text: str) -> Any:
    """The content of a YAML text. Raises yaml.YAMLError, and UserError for a key that is there twice."""
    return yaml.load(text, _Loader)
