"""What the docs site adds to the files of `docs/`: pages from the top level, the reference, the index of parts.

Documents link to each other and to files of the repository by relative paths, so that links work where the repository
is read. Here the same links lead to the pages that those files became.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
TOP_PAGES = {
    "README.md": "index.md",
    "docs/README.md": "contents.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
"""File of the repository → page, where the page has another name or place."""
SECTIONS = {"": "Using it", "systems": "Systems", "design": "Design notes"}
"""Folder of docs/ → the section of its pages."""
ROOMS = (
    "core", "projectors", "encoders", "embedders", "decoders", "teachers", "heads", "model", "data", "worlds",
    "checkpoints", "training", "evaluation", "callbacks", "commands",
)  # fmt: skip
"""In the order of imports; what is not named here comes behind them."""
PARTS = {
    "Encoders": ("lit_vlm.encoders", "Encoder"),
    "Projectors": ("lit_vlm.projectors", "Projector"),
    "Embedders": ("lit_vlm.embedders", "Embedder"),
    "Decoders": ("lit_vlm.decoders", "Decoder"),
    "Heads": ("lit_vlm.heads", "Head"),
    "Teachers": ("lit_vlm.teachers", "Teacher"),
    "Sources": ("lit_vlm.data", "Source"),
    "Worlds": ("lit_vlm.worlds", "Source"),
    "Mixtures": ("lit_vlm.data", "Mixture"),
    "Batchings": ("lit_vlm.data", "Batching"),
    "Templates": ("lit_vlm.data", "Template"),
    "Image transforms": ("lit_vlm.data", "ImageTransform"),
    "Tasks": ("lit_vlm.evaluation.tasks", "Task"),
    "Callbacks": ("callbacks", None),
}
"""Heading → the package whose `__all__` names its members, and the class they are made from, if they share one."""
LINK_OR_CODE = re.compile(
    r"\[([^\[\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)|^```.*?^```|^    [^\n]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL
)
"""A link to a file, as text, path and anchor; or code, in which nothing is a link."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages that mkdocs.yml does not name behind the others of their section, and the reference behind all."""
    assert config.nav is not None
    for folder, section in SECTIONS.items():
        pages = next(entry[section] for entry in config.nav if section in entry)
        named = {page for entry in pages for page in entry.values()}
        found = sorted(file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs" / folder).glob("*.md"))
        pages += [page for page in found if page not in named and f"docs/{page}" not in TOP_PAGES]
    rooms = [{package: page} for page, package, _ in _reference()]
    config.nav.append({"Reference": [{"Index of parts": "parts.md"}, *rooms]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for source, page in TOP_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    style = str(Path(__file__).with_name("style.css"))
    files.append(File.generated(config, "assets/style.css", abs_src_path=style))
    files.append(File.generated(config, "parts.md", content=_parts()))
    for page, package, modules in _reference():
        files.append(File.generated(config, page, content=_room(package, modules)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead links between files of the repository to the pages that they are here."""
    uri = page.file.src_uri
    source = {page: source for source, page in TOP_PAGES.items()}.get(uri, f"docs/{uri}")

    def lead(found: re.Match[str]) -> str:
        text, target, anchor = found.groups(default="")
        if not target:
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if (ROOT / path).is_dir():
            return text
        here, own_anchor = _page_of(path, config, files)
        return f"[{text}]({posixpath.relpath(here, posixpath.dirname(uri) or '.')}{anchor or own_anchor})"

    return LINK_OR_CODE.sub(lead, markdown)


def _page_of(path: str, config: MkDocsConfig, files: Files) -> tuple[str, str]:
    """The page, or the copy, of a file of the repository, and the anchor on it; a path that leads nowhere stays."""
    if path in TOP_PAGES:
        return TOP_PAGES[path], ""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    for page, package, modules in _reference():
        if path.endswith(".py") and module in (package, *modules):
            return page, f"#{module}"
    if (inside := path.removeprefix("docs/")) != path:
        return inside, ""
    copied = f"files/{path}"
    if (ROOT / path).is_file() and files.get_file_from_path(copied) is None:
        files.append(File.generated(config, copied, abs_src_path=str(ROOT / path)))
    return copied, ""


@cache
def _reference() -> list[tuple[str, str, list[str]]]:
    """Page, package and modules of each page of the reference."""
    pages = []
    for top in ("lit_vlm", "callbacks"):
        for folder in sorted({file.parent for file in (ROOT / top).rglob("*.py")}):
            package = ".".join(folder.relative_to(ROOT).parts)
            modules = [f"{package}.{file.stem}" for file in sorted(folder.glob("[!_]*.py"))]
            if modules:
                pages.append((f"reference/{package.removeprefix('lit_vlm.')}.md", package, modules))
    return sorted(pages, key=lambda page: (_floor(page[1]), page[1]))


def _floor(package: str) -> int:
    room = package.removeprefix("lit_vlm.").split(".")[0]
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def _room(package: str, modules: list[str]) -> str:
    """A page: what the package says of itself and defines, then its modules."""
    face = _loaded(package.split(".")[0]).modules_collection[package]
    defined = [name for name, one in face.members.items() if not (one.is_alias or one.is_module or name[0] == "_")]
    options = {"show_root_heading": False, "show_root_toc_entry": False, "members": defined or False}
    own = f"::: {package}\n    options: {json.dumps(options)}"
    return "\n\n".join([f"# {package}", own, *(f"::: {name}" for name in modules)])


def _parts() -> str:
    """The index: a table for each kind of part, with the first sentence that each says of itself."""
    lines = ["# Index of parts", "", "Config files name a part by its class path, flags by the bare name."]
    for heading, (package, kind) in PARTS.items():
        lines += ["", f"## {heading}", "", f"| in `{package}` | |", "|---|---|"]
        lines += [f"| [`{part.name}`][{part.canonical_path}] | {_first(part)} |" for part in _members(package, kind)]
    return "\n".join(lines)


@cache
def _loaded(top: str) -> griffe.GriffeLoader:
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    loader.load(top)
    return loader


def _members(package: str, kind: str | None) -> Iterator[griffe.Class]:
    face = _loaded(package.split(".")[0]).modules_collection[package]
    for name in sorted(map(str, face.exports or ()), key=str.lower):
        part = face[name].final_target if face[name].is_alias else face[name]
        if isinstance(part, griffe.Class) and (kind is None or kind in [base.name for base in part.mro()]):
            yield part


def _first(part: griffe.Class) -> str:
    text = part.docstring.value if part.docstring else ""
    return " ".join(text.split("\n\n")[0].split())
