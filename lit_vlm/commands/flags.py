"""The parser's errors about flags and config files, rewritten as one line with the nearest names.

The parser's own message nests an error for each type that it tried; users need the key, what was found, what was
expected, and what they may have meant.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lit_vlm.core.plugins import nearest, subclasses


class ClassList(NamedTuple):
    """A list of `lit-vlm parts` whose entries are the subclasses of a base.

    Attributes:
        base: the base class, as `package:Class`.
        keys: keys of a config that name an entry, or something below which one is named.
    """

    base: str
    keys: tuple[str, ...]


LISTS = {
    "encoders": ClassList("lit_vlm.encoders:Encoder", ("model.encoder",)),
    "projectors": ClassList("lit_vlm.projectors:Projector", ("model.projector",)),
    "embedders": ClassList("lit_vlm.embedders:Embedder", ("model.embedder",)),
    "decoders": ClassList("lit_vlm.decoders:Decoder", ("model.decoder",)),
    "heads": ClassList("lit_vlm.heads:Head", ("model.heads",)),
    "teachers": ClassList("lit_vlm.teachers:Teacher", ()),
    "sources": ClassList("lit_vlm.data:Source", ("data.train", "data.val")),
    "templates": ClassList("lit_vlm.data:Template", ("data.template",)),
    "transforms": ClassList("lit_vlm.data:ImageTransform", ("data.transform",)),
    "mixtures": ClassList("lit_vlm.data:Mixture", ("data.mixture",)),
    "batchings": ClassList("lit_vlm.data:Batching", ("data.batching",)),
    "callbacks": ClassList("lightning.pytorch:Callback", ("trainer.callbacks",)),
}
"""Title → the list."""


def explain(message: str, known: Sequence[str]) -> str:
    """Rewrite a parser's message as one line for users.

    Args:
        message: the parser's message.
        known: all flags of the command, without dashes.
    """
    text = message.strip()
    known = [flag for flag in known if not flag.endswith((".help", "+"))]
    keys = (r'Parser key "([^"]+)"', r"argument --([\w.+]+)", r"^([\w.]+): ")
    key = next((one for pattern in keys if (one := _first(pattern, text))), "")
    for pattern, say in RULES:
        if found := re.search(pattern, text, re.DOTALL):
            return say(key, found, known)
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    return " ".join(lines)[:600] or "the config does not parse"


def innermost(message: str) -> str:
    """Of an error that lists all forms that a value could have had, the one that was meant, with its key."""
    if not message.startswith(("Does not validate", "Parser key")):
        return message
    noise = ("Expected a", "Not of type", "Subtypes", "Errors", "Given value", "Does not validate", "Parser key")
    lines = [line.strip(" -") for line in message.splitlines()]
    said = [line for line in lines if line and not line.startswith(noise)]
    if not said:
        return message
    reason = said[0].removeprefix("Problem with given class_path").strip()
    names = re.findall(r"'(\w+)': Namespace\(class_path=[^{}]*?path='([^']*)'", message)
    name = next((name for name, path in names if path and path in reason), None)
    return (
        f"{reason} (source '{name}'; set its path with --data.train.{name}.path or --data.val.{name}.path)"
        if name
        else reason
    )


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found[1] if found else None


def _unknown_flag(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    flag = found[1].split("=")[0]
    return f"there is no flag {flag}{nearest(flag.removeprefix('--'), known, '--')}"


def _unknown_key(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    whole = f"{key}.{found[1]}" if key else found[1]
    return f"{whole}: there is no such key{nearest(whole, known, '--')}"


def _unknown_class(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    return f"{key}: there is no class '{found[1]}'{_near_class(key, found[1])}"


def _near_class(key: str, name: str) -> str:
    """A hint: the classes that may have been meant, and the command that lists all."""
    if key.startswith("trainer.logger"):
        base: type[Any] = importlib.import_module("lightning.pytorch.loggers").Logger
        loggers = [one.__name__ for one in subclasses(base)]
        return f"{nearest(name, loggers)}; there are {', '.join(sorted(loggers))}"
    title = next((t for t, one in LISTS.items() for start in one.keys if f"{key}.".startswith(f"{start}.")), None)
    if title is None:
        return ""
    package, _, class_name = LISTS[title].base.partition(":")
    names = [one.__name__ for one in subclasses(getattr(importlib.import_module(package), class_name))]
    return f"{nearest(name.rpartition('.')[2], names)}; lit-vlm parts {title} lists them"


def _no_module(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    return (
        f"{key}: there is no module '{found[1]}'; it must lie in the working folder, on PYTHONPATH or in an installed "
        "package"
    )


def _no_attribute(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    module = importlib.import_module(found[1])
    return (
        f"{key}: {found[1]} has no '{found[2]}'{nearest(found[2], [name for name in vars(module) if name[0] != '_'])}"
    )


def _unknown_argument(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    name, path = found["option"], found["path"]
    own = _arguments(path)
    listed = f"; its arguments are {', '.join(own)}" if own else "; it takes none"
    return f"{key}: {path.rpartition('.')[2]} has no argument '{name}'{nearest(name, own)}{listed}"


def _missing_argument(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    path = _first(r"class_path='?([\w.]+)", found.string) or "the class"
    near = _near_class(key, path)
    other = "" if f"'{path.rpartition('.')[2]}'" in near else f", or take a class of this key{near}"
    return f"{key}: {path.rpartition('.')[2]} needs the argument '{found[1]}': give it{other}"


def _no_file(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    return f"--{key}: there is no file {found[1]}"


def _no_key(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    return f"{found[1]} is nowhere given: name the config files of a stage (--config FILE), or give --{found[1]}"


def _no_value(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    return f"--{key} needs a value behind it"


def _choice(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    choices = re.findall(r"'([^']+)'", found[1])
    return f"{key}: expected one of {', '.join(choices)}, found '{found[2]}'{nearest(found[2], choices)}"


def _type(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    inner = re.findall(r'Parser key "([^"]+)"', found.string)
    whole = ".".join([key, *inner[1:]]) if key else "?"
    return f"{whole}: expected {found[1].replace('builtins.', '')}, found '{found[2]}'"


def _arguments(path: str) -> list[str]:
    """Names of a class's arguments, without those that come from neighbouring parts of the model."""
    package, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(package), name)
        parameters = inspect.signature(kind).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError):
        return []
    given = ("in_width", "out_width", "width", "vocab_size", "num_layers")
    return [p.name for p in parameters if not (p.name in given and p.default is p.empty)]


Say = Callable[[str, re.Match[str], Sequence[str]], str]


def _several_classes(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    return f"{key}: there are several classes named '{found[1]}': name the one that is meant by its whole path"


def _choices(key: str, found: re.Match[str], known: Sequence[str]) -> str:
    choices = [
        one.strip(" '\"") for group in re.findall(r"Literal\[([^\]]*)\]", found.string) for one in group.split(",")
    ]
    value = re.findall(r"Given value: (\S+)", found.string)[-1:] or [""]
    listed = ", ".join(dict.fromkeys(choices))
    return f"{key}: expected one of {listed}, found '{value[0]}'{nearest(value[0], choices)}"


RULES: list[tuple[str, Say]] = [
    (r"Multiple subclasses with name (\w+)", _several_classes),
    (r"File does not exist: '([^']+)'", _no_file),
    (r"Option '(?:fit\.|validate\.|test\.|predict\.)?([\w.]+\.[\w.]+)' is required but not provided", _no_key),
    (r"Unrecognized arguments: (--?\S+)", _unknown_flag),
    (r"expected (?:one|at least one) argument", _no_value),
    (r"No module named '([\w.]+)'", _no_module),
    (r"module '([\w.]+)' has no attribute '(\w+)'", _no_attribute),
    (r"Option '(?P<option>\w+)' is not accepted.*?class_path='(?P<path>[\w.]+)'", _unknown_argument),
    (r"class_path '(?P<path>[\w.]+)':\s+Option '(?P<option>\w+)' is not accepted", _unknown_argument),
    (r"Option '(\w+)' is required but not provided", _missing_argument),
    (r"Expected a dot import path string: (\S+)", _unknown_class),
    (r"Option '(\w+)' is not accepted", _unknown_key),
    (r"Expected a typing\.Literal\[([^\]]*)\]\. Got value: (\S+)", _choice),
    (r"Does not validate against any of the Union subtypes.*Literal\[", _choices),
    (r"Expected an? <class '([\w.]+)'>\. Got value: ([^\n]{1,80}?)(?:\. Got value|\n|$)", _type),
]
"""Pattern of a parser's message → function that rewrites it; the first pattern that fits counts."""
