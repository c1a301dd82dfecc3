"""`lit-vlm parts`: lists of all classes, tasks and recipes that flags can name, the kit's own and those of plugins."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lit_vlm.commands.cli import LIGHTNING, VERBS
from lit_vlm.commands.flags import LISTS
from lit_vlm.commands.recipe import find_recipe, shipped_recipes
from lit_vlm.commands.verb import Verb
from lit_vlm.core.plugins import load_plugins, nearest, subclasses

PACKAGES = ("lit_vlm.data", "lit_vlm.worlds", "lit_vlm.teachers", "callbacks")


class Entry(NamedTuple):
    """One line of a list.

    Attributes:
        name: the bare name.
        path: the full name, such as the class path, or "".
        about: one line that describes it.
    """

    name: str
    path: str
    about: str


class Kind(NamedTuple):
    """One list.

    Attributes:
        title: its name, also on the command line.
        flag: the flag or key that names an entry.
        about: what the entries do.
        entries: finds the entries.
    """

    title: str
    flag: str
    about: str
    entries: Callable[[], Iterator[Entry]]


def main(argv: Sequence[str]) -> None:
    """Print the lists.

    Raises:
        ValueError: for an unknown list, with the nearest names.
    """
    parser = argparse.ArgumentParser(
        prog="lit-vlm parts",
        description="List what a recipe or a flag can name: parts of each slot, data, tasks, families, callbacks, "
        "verbs and recipes; with --plugins MODULE those of that package, too.",
    )
    titles = ", ".join(kind.title for kind in KINDS)
    parser.add_argument("kind", nargs="*", metavar="KIND", help=f"only these: {titles}")
    parser.add_argument("--markdown", action="store_true", help="as Markdown tables, for documents")
    arguments = parser.parse_args(argv)
    known = {kind.title: kind for kind in KINDS}
    for name in arguments.kind:
        if name not in known:
            raise ValueError(f"there is no list '{name}'{nearest(name, known)}; lists: {', '.join(known)}")
    for package in PACKAGES:
        importlib.import_module(package)  # defines the classes that are listed as subclasses of their bases
    load_plugins()
    console = Console(highlight=False)
    for kind in [known[name] for name in arguments.kind] or KINDS:
        entries = sorted(set(kind.entries()), key=lambda entry: entry.name.lower())
        if arguments.markdown:
            console.out(_markdown(kind, entries), highlight=False)
        else:
            console.print(_table(kind, entries))


def _table(kind: Kind, entries: Sequence[Entry]) -> Table:
    title = f"{kind.title} ({kind.flag}): {kind.about}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for entry in entries:
        own = entry.path.split(".")[0] in ("", "lit_vlm", "callbacks")
        table.add_row(entry.name, escape(entry.about) + ("" if own else f" [dim]{entry.path}[/]"))
    return table


def _markdown(kind: Kind, entries: Sequence[Entry]) -> str:
    lines = [
        f"## {kind.title}",
        "",
        f"`{kind.flag}`: {kind.about}.",
        "",
        "| name | what it is | path |",
        "|---|---|---|",
    ]
    for entry in entries:
        about = entry.about.replace("|", "\\|")
        lines.append(f"| `{entry.name}` | {about} | {f'`{entry.path}`' if entry.path else ''} |")
    return "\n".join([*lines, ""])


def public_path(kind: type) -> str | None:
    """The shortest path that names a class; None for a class of the kit that no `__all__` lists."""
    names = kind.__module__.split(".")
    for end in range(1, len(names) + 1):
        package = importlib.import_module(".".join(names[:end]))
        if kind.__name__ in getattr(package, "__all__", ()) and getattr(package, kind.__name__) is kind:
            return f"{package.__name__}.{kind.__name__}"
    return None if names[0] in ("lit_vlm", "callbacks") else f"{kind.__module__}.{kind.__qualname__}"


def first_line(thing: object) -> str:
    """The first line of a docstring, without its full stop."""
    return (inspect.getdoc(thing) or "").partition("\n")[0].rstrip(".:")


def _classes(title: str) -> Callable[[], Iterator[Entry]]:
    """A function that imports the package of a list's base class, and lists the subclasses of that base."""

    def entries() -> Iterator[Entry]:
        package, _, name = LISTS[title].base.partition(":")
        for kind in subclasses(getattr(importlib.import_module(package), name)):
            if (path := public_path(kind)) is not None:
                yield Entry(kind.__name__, path, first_line(kind))

    return entries


def _tasks() -> Iterator[Entry]:
    tasks = importlib.import_module("lit_vlm.evaluation.tasks")
    for kind in {*tasks.TASKS.values(), *(k for k in subclasses(tasks.Task) if public_path(k))}:
        yield Entry(kind.name, public_path(kind) or "", kind.about)


def _forms() -> Iterator[Entry]:
    for name, kind in importlib.import_module("lit_vlm.data.sets.forms").FORMS.items():
        yield Entry(name, public_path(kind) or "", first_line(kind))


def _steps() -> Iterator[Entry]:
    for kind in subclasses(importlib.import_module("lit_vlm.data.curation").Step):
        if (path := public_path(kind)) is not None:
            yield Entry(kind.__name__, path, first_line(kind))


def _families() -> Iterator[Entry]:
    published = importlib.import_module("lit_vlm.checkpoints.published")
    own = {type(family) for family in published.FAMILIES.values()}
    for family in published.FAMILIES.values():
        yield Entry(family.name, "", first_line(type(family)))
    for kind in set(subclasses(published.Family)) - own:
        yield Entry(kind.name, public_path(kind) or "", first_line(kind))


def _callbacks() -> Iterator[Entry]:
    callbacks = importlib.import_module("callbacks")
    for name in callbacks.__all__:
        yield Entry(name, f"callbacks.{name}", first_line(getattr(callbacks, name)))


def _verbs() -> Iterator[Entry]:
    for name, about in (VERBS | LIGHTNING).items():
        yield Entry(name, "", about)
    for kind in subclasses(Verb):  # type: ignore[type-abstract]
        if kind.name in VERBS | LIGHTNING:
            raise ValueError(
                f"the command '{kind.name}' of {public_path(kind)} has the name of one of the kit's: rename it"
            )
        yield Entry(kind.name, public_path(kind) or "", kind.about)


def _recipes() -> Iterator[Entry]:
    for name in shipped_recipes():
        yield Entry(name, "", find_recipe(name).about.rstrip("."))


KINDS = [
    Kind("encoders", "--model.encoder", "pixels to visual tokens", _classes("encoders")),
    Kind("projectors", "--model.projector", "encoder width to decoder width", _classes("projectors")),
    Kind("embedders", "--model.embedder", "ids and visual tokens to vectors", _classes("embedders")),
    Kind("decoders", "--model.decoder", "the language model", _classes("decoders")),
    Kind("heads", "--model.heads.NAME", "auxiliary losses", _classes("heads")),
    Kind("teachers", "--model.heads.NAME.teacher", "what a head learns from", _classes("teachers")),
    Kind("sources", "--data.train.NAME", "where records come from", _classes("sources")),
    Kind("templates", "--data.template", "how messages are written", _classes("templates")),
    Kind("transforms", "--data.transform", "how pictures are resized", _classes("transforms")),
    Kind("mixtures", "--data.mixture", "how sources are mixed", _classes("mixtures")),
    Kind("batchings", "--data.batching", "how samples become rows", _classes("batchings")),
    Kind("forms", "lit-vlm data convert --form", "how a file is read", _forms),
    Kind("steps", "lit-vlm data curate FILE: steps", "which records stay", _steps),
    Kind("tasks", "lit-vlm evaluate --task", "benchmarks", _tasks),
    Kind("families", "start_from NAME:FOLDER", "published weights, in and out", _families),
    Kind("callbacks", "--trainer.callbacks+", "what watches a run", _callbacks),
    Kind("verbs", "lit-vlm NAME", "commands", _verbs),
    Kind("recipes", "lit-vlm run NAME", "systems and their stages", _recipes),
]
