"""The page of curations shows every step with its arguments, and an example that can be read."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import yaml

from lit_vlm.data.curation import STEPS, Step
from lit_vlm.data.curation.file import KEYS
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0] if heading else PAGE.split("\n## ")[0]
    return [line.strip("|").split("|") for line in section.splitlines() if re.match(r"\| `", line)]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def test_the_table_names_all_steps_with_their_arguments() -> None:
    told = {names(row[0])[0]: names(row[1]) for row in rows("Steps")}
    assert told == {name: list(inspect.signature(kind).parameters) for name, kind in STEPS.items()}


def test_the_table_names_all_keys() -> None:
    assert tuple(names(row[0])[0] for row in rows("")) == KEYS


def test_the_example_names_arguments_that_steps_have() -> None:
    found = re.search(r"```yaml\n# mix.yaml\n(.*?)```", PAGE, re.DOTALL)
    assert found is not None
    raw = yaml.safe_load(found[1])
    assert set(raw) == set(KEYS)
    for step in raw["steps"]:
        assert set(step["init_args"]) <= set(inspect.signature(STEPS[step["class_path"]]).parameters)


@pytest.mark.parametrize("name", sorted(STEPS))
def test_every_step_says_what_it_does_and_what_its_arguments_are(name: str) -> None:
    kind: type[Step] = STEPS[name]
    text = inspect.getdoc(kind) or ""
    assert kind.__doc__ is not None
    for argument in inspect.signature(kind).parameters:
        assert re.search(rf"^    {argument}: ", text, re.MULTILINE), argument


def test_what_is_written_is_there(tmp_path: Path) -> None:
    from lit_vlm.data.curation import Curation, Size, curate
    from tests.data.curation.planted import CAPTION, captions, encoded

    source = captions(tmp_path / "a", [(encoded(), CAPTION), (encoded((10, 10)), CAPTION)])
    curate(Curation("a", (source,), (Size(min_side=20),)), tmp_path / "OUT", tmp_path / "OUT.measures")
    told = [names_of for row in rows("What is written") for names_of in re.findall(r"`(OUT[\w./-]*)`", row[0])]
    assert len(told) == 6
    for path in told:
        assert (tmp_path / path.replace("2-Text", "1-Size")).exists(), path
