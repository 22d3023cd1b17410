"""Read YAML as a configuration needs it: one regular file of plain values, with every key once.

PyYAML's safe loader accepts more, and some of it surprises: dates, numbers in base 60 (`1:30` is 90), the last of two
equal keys, and aliases that unfold to any size. Here these are text or an error.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml

from purld.errors import UserError, reason_of

_MAX_BYTES = 1 << 20
_MAX_VALUES = 100_000  # after aliases are unfolded
_PLAIN_TAGS = [f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")]


class _PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader without dates, base 60, binary data and sets, and with every key once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Make a mapping; a key that occurs twice is an error."""
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for index, key in enumerate(keys):
            if any((key.value, key.tag) == (other.value, other.tag) for other in keys[:index]):
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value} occurs twice", key.start_mark)
        return super().construct_mapping(node, deep)


_PlainLoader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _PLAIN_TAGS
}
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":int", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:int",
    re.compile(r"^[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)$"),
    list("-+0123456789"),
)
_PlainLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^([-+]?([0-9][0-9_]*)\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def read_yaml(path: Path) -> Any:
    """Return the plain values in a YAML file.

    Raises:
        UserError: it is missing, no regular file, too large, not UTF-8 or not plain YAML; the message names it.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe or a device"
            raise UserError(f"{path}: is {kind}; give a YAML file.")
        if status.st_size > _MAX_BYTES:
            raise UserError(f"{path}: has {status.st_size:,} bytes; a configuration has at most {_MAX_BYTES:,}.")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not text in UTF-8 (byte {error.start}: {error.reason}).") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise UserError(f"{str(path)[:200]}: cannot be read ({reason or reason_of(error)}).") from None
    try:
        return parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: is not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML: {' '.join(str(error).split())}.") from None


def parse_yaml(text: str) -> Any:
    """Return the plain values in a YAML text.

    Raises:
        yaml.YAMLError: it is not plain YAML.
    """
    loader = _PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count_values(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("its values are nested too deeply") from None
    except (ValueError, KeyError, OverflowError) as error:
        raise yaml.YAMLError(f"a value cannot be read ({str(error)[:100]})") from None
    finally:
        loader.dispose()


def _count_values(node: yaml.Node, counted: dict[int, int]) -> int:
    """Count the values under a node with aliases unfolded; `counted` holds the counts by node, 0 while it is counted.

    Raises:
        yaml.YAMLError: there are too many, or an alias contains itself.
    """
    if id(node) in counted:
        if counted[id(node)] == 0:
            raise yaml.YAMLError("an alias contains itself")
        return counted[id(node)]
    counted[id(node)] = 0
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    total = 1 + sum(_count_values(part, counted) for part in parts)
    if total > _MAX_VALUES:
        raise yaml.YAMLError(f"it unfolds to more than {_MAX_VALUES:,} values")
    counted[id(node)] = total
    return total
