"""YAML that people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from kairos.errors import UserError

MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path, what: str) -> Any:
    """The content of a YAML file, called `what` in errors. Raises UserError, in one line."""
    try:
        return load_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no {what} at {path}") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {(error.strerror or str(error)).lower()}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def load_yaml(text: str) -> Any:
    """The content of a YAML text. Raises yaml.YAMLError, and UserError for a key that is there twice: YAML's
    own reader would take the last and say nothing."""
    check_keys_once(yaml.compose(text, yaml.SafeLoader))
    return yaml.safe_load(text)


def check_keys_once(root: Any) -> None:
    """Refuse a key that a mapping of the tree has twice."""
    waiting, known = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in known:  # an alias
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            waiting += [value for _, value in node.value]
            keys = set()
            for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
                if (key.tag, key.value) in keys and key.tag != MERGE:
                    raise UserError(
                        f"the key {key.value!r} is there twice, at line {key.start_mark.line + 1}"
                    )
                keys.add((key.tag, key.value))
