"""Classes that other packages bring, by their path or by their bare name.

A plugin is a module whose import defines such classes: tasks, sources, templates, families, verbs, parts. It is named
by the flag `--plugins`, by the key `plugins` of recipe.yaml, or by the entry point group `lit_vlm.plugins` of an
installed package. A class path needs none of them, only a module that can be imported from here.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TypeVar

VARIABLE = "LIT_VLM_PLUGINS"
"""Environment variable: names of plugins, separated by commas; processes that are started inherit it."""
GROUP = "lit_vlm.plugins"
T = TypeVar("T")


def use_plugins(names: Iterable[str]) -> None:
    """Name plugins for this process and for those that it starts."""
    names = [name.strip() for name in names if name.strip()]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise ValueError(f"a plugin is named by its module, such as my_lab.tasks, not '{name}'")
    known = (name.strip() for name in (*named_plugins(), *names))
    os.environ[VARIABLE] = ",".join(dict.fromkeys(name for name in known if name))


def named_plugins() -> list[str]:
    """The plugins that are named in this process."""
    return [name for name in os.environ.get(VARIABLE, "").split(",") if name]


def load_plugins() -> None:
    """Import all plugins that are named, and those of installed packages.

    Raises:
        ValueError: for a plugin that cannot be imported, saying who named it.
    """
    named = {name: f"the plugin '{name}'" for name in named_plugins()}
    installed = {
        entry.value: f"the plugin '{entry.value}' of the installed package {entry.dist.name if entry.dist else ''}"
        for entry in entry_points(group=GROUP)
    }
    for name, who in (installed | named).items():
        try:
            importlib.import_module(name)
        except (Exception, SystemExit) as error:  # a module may end the process when it is imported
            raise ValueError(
                f"{who} cannot be imported ({type(error).__name__}: {error}): it must lie in the working folder, on "
                "PYTHONPATH or in an installed package; see --plugins, and plugins in recipe.yaml"
            ) from error


def find_class(name: str, base: type[T], own: Mapping[str, type[T]], what: str, others: Sequence[str] = ()) -> type[T]:
    """A class by its bare name or by its path.

    Args:
        name: bare name of a class of the kit or of a plugin, or `package.module.Class`.
        base: what the class must be a subclass of.
        own: the kit's classes, by bare name.
        what: which flag or key names it, for messages, e.g. `--task`.
        others: names that are no classes but could be meant, for messages.

    Raises:
        ValueError: for a name or path that leads nowhere, with the nearest names, or to no such class.
    """
    if name in own:
        return own[name]
    if "." in name:
        found = _at(name, what)
        if not (inspect.isclass(found) and issubclass(found, base)):
            raise ValueError(f"{what} {name}: this is no subclass of {base.__module__}.{base.__name__}")
        if inspect.isabstract(found):
            lacking = ", ".join(sorted(getattr(found, "__abstractmethods__", ())))
            raise ValueError(f"{what} {name}: the class lacks {lacking}")
        return found
    load_plugins()
    brought = {key: kind for kind in subclasses(base) for key in (getattr(kind, "name", None), kind.__name__) if key}
    if name in brought:
        return brought[name]
    known = [*own, *others]
    raise ValueError(
        f"{what}: there is no '{name}'{nearest(name, [*known, *brought])}; there are {', '.join(known)}, and any class "
        "by its path (package.module.Class)"
    )


def subclasses(base: type[T]) -> Iterator[type[T]]:
    """All concrete and public subclasses of a base, direct or not, in modules that are loaded."""
    for kind in base.__subclasses__():
        if not inspect.isabstract(kind) and not kind.__name__.startswith("_"):
            yield kind
        yield from subclasses(kind)


def nearest(name: str, names: Iterable[str], before: str = "") -> str:
    """Words for a message: " (did you mean 'a' or 'b'?)" with the most similar names, or "" if none is similar.

    Args:
        name: what was given.
        names: what there is.
        before: text in front of each name that is shown.
    """
    known = list(dict.fromkeys(names))
    close = difflib.get_close_matches(name, known, n=3)
    close = close or [other for other in known if name and other.lower().startswith(name.lower())][:3]
    meant = " or ".join(f"'{before}{other}'" for other in close)
    return f" (did you mean {meant}?)" if close else ""


def _at(path: str, what: str) -> object:
    """The object that a dotted path leads to; raises ValueError where there is none."""
    place, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise ValueError(f"{what} {path}: importing {place} fails: {error}") from error
        raise ValueError(
            f"{what} {path}: there is no module '{error.name}'; it must lie in the working folder, on PYTHONPATH or in "
            "an installed package"
        ) from error
    except Exception as error:
        raise ValueError(f"{what} {path}: importing {place} fails: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise ValueError(
            f"{what} {path}: the module {place} has no '{attribute}'"
            f"{nearest(attribute, [key for key in vars(module) if not key.startswith('_')])}"
        )
    return getattr(module, attribute)
