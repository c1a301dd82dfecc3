"""What the docs site adds to the files of `docs/`: pages from the top level, and the reference.

Documents link to each other and to files of the repository by relative paths, so that links work where the repository
is read. Here the same links lead to the pages that those files became.
"""

from __future__ import annotations

import json
import posixpath
import re
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
LINK_OR_CODE = re.compile(
    r"\[([^\[\]]*)\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)|^```.*?^```|^    [^\n]*$|`[^`\n]*`", re.MULTILINE | re.DOTALL
)
"""A link to a file, as text, path and anchor; or code, in which nothing is a link."""
CLASS_CELL = re.compile(r"\| `((?:lit_vlm|callbacks)\.[\w.]+)` \|$", re.MULTILINE)
"""The last cell of a row of parts.md."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put pages that mkdocs.yml does not name behind the others of their section, and the reference behind all."""
    assert config.nav is not None
    for folder, section in SECTIONS.items():
        pages = next(entry[section] for entry in config.nav if section in entry)
        named = {page for entry in pages for page in entry.values()}
        found = sorted(file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs" / folder).glob("*.md"))
        pages += [page for page in found if page not in named and f"docs/{page}" not in TOP_PAGES]
    rooms = [{package: page} for page, package, _ in _reference()]
    config.nav.append({"Reference": rooms})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are no files of docs/."""
    for source, page in TOP_PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    style = str(Path(__file__).with_name("style.css"))
    files.append(File.generated(config, "assets/style.css", abs_src_path=style))
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

    led = LINK_OR_CODE.sub(lead, markdown)
    return CLASS_CELL.sub(_refer, led) if uri == "parts.md" else led


def _refer(found: re.Match[str]) -> str:
    """The class path of a table as a link to the class in the reference."""
    package, _, name = found[1].rpartition(".")
    part = _loaded(package.split(".")[0]).modules_collection[package][name]
    return f"| [`{found[1]}`][{part.canonical_path}] |"


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


@cache
def _loaded(top: str) -> griffe.GriffeLoader:
    loader = griffe.GriffeLoader(search_paths=[ROOT], allow_inspection=False)
    loader.load(top)
    return loader
