"""Documents name what there is: links, anchors, files and class paths, in every Markdown file."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

from lit_vlm import __version__
from lit_vlm.commands.cli import LIGHTNING, VERBS
from lit_vlm.core.plugins import GROUP
from tests.tiny import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / ".github").rglob("*.md")])
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\((?![a-z]+:)([^)\s#]*)(?:#([^)\s]*))?\)")
CODE = re.compile(r"`([^`\n]+)`|^(?: {4}|\t)(.+)$", re.MULTILINE)
NAME = re.compile(r"(?<![\w./])(?:lit_vlm|callbacks)(?:\.(?!jsonl?\b)\w+)+")
VERB = re.compile(r"\blit-vlm ([a-z]\w*)")
PATH = re.compile(r"(?:lit_vlm|callbacks|tests|recipes|docs)/[\w./-]*")
HISTORY = "CHANGELOG.md"
"""May name what was."""


def _name(document: Path) -> str:
    return str(document.relative_to(ROOT))


def _anchors(document: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", FENCED.sub("", document.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _links(document: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link to a file or heading of the repository."""
    text = INLINE.sub("", FENCED.sub("", document.read_text(encoding="utf-8")))
    return ((found[1], found[2] or "") for found in LINK.finditer(text))


@cache
def _defined(module: str) -> frozenset[str] | None:
    """What a module defines or imports by name, read and not run; None where there is no such module."""
    base = ROOT.joinpath(*module.split("."))
    file = base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
    if not file.exists():
        return None
    names: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.ImportFrom | ast.If):
            inner = (
                [node] if isinstance(node, ast.ImportFrom) else [n for n in node.body if isinstance(n, ast.ImportFrom)]
            )
            names |= {alias.asname or alias.name for one in inner for alias in one.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(names)


def _exists(name: str) -> bool:
    """Whether a dotted name is a module, or something in one (or an attribute of that)."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if (defined := _defined(".".join(parts[:end]))) is not None:
            return end == len(parts) or parts[end] in defined
    return False


def test_there_are_documents() -> None:
    assert {"README.md", "CONTRIBUTING.md", "docs/data.md", "docs/systems/vila.md"} <= set(map(_name, DOCUMENTS))


@pytest.mark.parametrize("document", DOCUMENTS, ids=_name)
def test_links_lead_somewhere(document: Path) -> None:
    dead = []
    for path, anchor in _links(document):
        target = (document.parent / path).resolve() if path else document
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            dead.append(f"{path}#{anchor}")
    assert dead == []


@pytest.mark.parametrize("document", [one for one in DOCUMENTS if _name(one) != HISTORY], ids=_name)
def test_names_and_files_are_those_of_now(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    stale = {name for name in NAME.findall(text) if name != GROUP and not _exists(name)}
    for code in INLINE.findall(FENCED.sub("", text)):
        path = PATH.fullmatch(code)
        # Words in capitals stand for what the reader puts there.
        if path and not re.search(r"[A-Z]{3,}", code) and not (ROOT / code).exists():
            stale.add(code)
    assert stale == set()


def test_commands_are_those_of_now() -> None:
    asked = {
        (_name(document), verb)
        for document in DOCUMENTS
        for found in CODE.finditer(document.read_text(encoding="utf-8"))
        for verb in VERB.findall(found[1] or found[2])
    }
    assert len(asked) > 10
    # The example of a command that another package brings.
    known = {**VERBS, **LIGHTNING, "count": "docs/extending.md"}
    assert {(document, verb) for document, verb in asked if verb not in known} == set()


def test_ci_runs_the_readme_s_test_command_and_builds_the_docs() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command = re.search(
        r"^    (.+?) +# lint, types and tests; make test-slow runs those that take longer$", readme, re.MULTILINE
    )
    assert command
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert lines[-1] == command[1]
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step] == [
        command[1],
        "make docs",
        "make test-slow",
    ]


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
