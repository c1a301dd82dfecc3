"""Files of settings: YAML that becomes a checked object; what is wrong with one is said in a line."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from lit_vlm.core.plugins import nearest

Settings = TypeVar("Settings", bound=BaseModel)
TAG = "tag:yaml.org,2002:"


class StrictYaml(yaml.SafeLoader):
    """YAML in which a key stands once in its mapping, and a value that is not of the type it names is an error."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Read a mapping as it is written, before `<<` adds keys that it may replace."""
        node = super().compose_mapping_node(anchor)
        first: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            name = (key.tag, str(key.value))
            if name in first:
                text = f"the key {key.value!r} stands here and in line {first[name]}; a key stands once"
                raise yaml.MarkedYAMLError(problem=text, problem_mark=key.start_mark)
            first[name] = key.start_mark.line + 1
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Make the value of a node."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, LookupError, AttributeError) as error:  # what PyYAML raises of `!!int four`
            text = f"{node.value!r} is no {node.tag.removeprefix(TAG)}"
            raise yaml.MarkedYAMLError(problem=text, problem_mark=node.start_mark) from error


class PlainYaml(StrictYaml):
    """YAML in which `off`, `on`, 12:00:00 and 2024-01-01 are words, and only true, false and plain numbers are not."""


PlainYaml.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag.removeprefix(TAG) in ("null", "merge")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
FLOAT = r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+][0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
PlainYaml.add_implicit_resolver(f"{TAG}bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
PlainYaml.add_implicit_resolver(f"{TAG}int", re.compile(r"[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
PlainYaml.add_implicit_resolver(f"{TAG}float", re.compile(FLOAT), list("-+.0123456789"))


def read_mapping(path: Path, holds: str, loader: type[StrictYaml] = PlainYaml, named: str = "") -> dict[str, Any]:
    """The keys of a YAML file; none for an empty one.

    Args:
        path: the file.
        holds: what it should hold, with an example: "keys of a search, such as 'recipe: eve'".
        loader: how values are read.
        named: what says that this is the file, such as an environment variable.

    Raises:
        ValueError: for a file that is missing, no YAML, or no mapping, and for a key that stands twice, with its line.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        by = f" ({named})" if named else ""
        raise ValueError(f"{path}{by} cannot be read: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {holds}, not a {type(content).__name__}")
    return content


def check_keys(where: str, content: Mapping[Any, Any], known: Collection[str]) -> None:
    """Refuse a key that is none.

    Args:
        where: file and place, for the message.
        content: the keys.
        known: those that there are.

    Raises:
        ValueError: with the nearest one.
    """
    if unknown := [str(key) for key in content if key not in known]:
        near = nearest(unknown[0], known)
        raise ValueError(f"{where}: there is no key '{unknown[0]}'{near}; keys: {', '.join(known)}")


def checked(kind: type[Settings], content: Mapping[str, Any], where: str) -> Settings:
    """An object of the keys of a file.

    Args:
        kind: its class.
        content: the keys.
        where: the file, for messages.

    Raises:
        ValueError: for an unknown key or a wrong value, with the place and what was found.
    """
    check_keys(where, content, list(kind.model_fields))
    try:
        return kind(**content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        found = "" if isinstance(first["input"], dict | BaseModel) else f", found {first['input']!r}"
        text = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {f'{place}: ' if place else ''}{text}{found}") from error
