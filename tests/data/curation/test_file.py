"""Curation files: what they make, and one line for whatever is wrong in them."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lit_vlm.data.curation import STEPS, Sample, Score, Size, Text, read_curation
from lit_vlm.data.sets.convert import convert
from lit_vlm.data.sources import Captions, Converted, Pictures
from tests.data.curation.planted import CAPTION, Brightness, encoded, write


def written(folder: Path, text: str) -> Path:
    write(folder / "some", [(encoded(), CAPTION)])
    (folder / "some" / "a.png").write_bytes(encoded())
    file = folder / "mix.yaml"
    file.write_text(text.replace("HERE", str(folder)))
    return file


def test_a_file_makes_sources_and_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_DATA", str(tmp_path / "some"))
    file = written(
        tmp_path,
        """
        sources:
          one: HERE/some/captions.jsonl
          two: {path: HERE/some/captions.jsonl, form: Captions}
          three: {class_path: Pictures, init_args: {path: "${oc.env:SOME_DATA}", name: other}}
          four: {class_path: lit_vlm.data.Captions, init_args: {path: "${oc.env:SOME_DATA}/captions.jsonl"}}
          five: HERE/set
        steps:
          - {class_path: Size, init_args: {min_side: 448}}
          - class_path: lit_vlm.data.curation.Text
            init_args: {languages: [en], blocked: ["(?i)lorem"]}
          - class_path: Score
            init_args:
              classifier: {class_path: tests.data.curation.planted.Brightness, init_args: {power: 2}}
              max_score: 0.25
          - {class_path: Sample, init_args: {quotas: {one: 10}}}
        seed: 7
        """,
    )
    convert(Captions(str(tmp_path / "some" / "captions.jsonl")), tmp_path / "set")
    curation = read_curation(file, STEPS)
    assert [source.name for source in curation.sources] == ["one", "two", "three", "four", "five"]
    kinds = [type(source) for source in curation.sources]
    assert kinds == [Captions, Captions, Pictures, Captions, Converted]
    assert [type(step) for step in curation.steps] == [Size, Text, Score, Sample]
    assert (curation.name, curation.seed) == ("mix", 7)
    size, text, score, sample = curation.steps
    assert (size.key, text.key) == (Size(min_side=448).key, Text(languages=["en"], blocked=["(?i)lorem"]).key)
    assert score.key == Score(Brightness(2.0), max_score=0.25).key
    assert sample.key == Sample(quotas={"one": 10}).key


GOOD = {
    "sources": {"a": "HERE/some/captions.jsonl"},
    "steps": [{"class_path": "Size", "init_args": {"min_side": 4}}],
}
STEP = "HERE/mix.yaml: steps[0]"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"step": []}, "HERE/mix.yaml: there is no key 'step' (did you mean 'steps'?); there are sources, steps, seed"),
        ({"sources": {}}, "HERE/mix.yaml: sources is a mapping, name → path or reader, with at least one entry"),
        ({"steps": {"a": 1}}, "HERE/mix.yaml: steps is a list of {class_path, init_args}, with at least one entry"),
        ({"seed": -1}, "HERE/mix.yaml: seed is -1; expected a whole number, not negative"),
        ({"sources": {"a": "HERE/none"}}, "HERE/mix.yaml: sources.a: there is no HERE/none"),
        ({"sources": {"a": {"path": "HERE/some", "from": "x"}}}, "HERE/mix.yaml: sources.a: there is no key 'from'"),
        ({"sources": {"a": {"path": "HERE/mix.yaml"}}}, "the ending '.yaml' is not known: name its form, as in {path"),
        (
            {"sources": {"a": {"path": "HERE/some", "form": "Picture"}}},
            "sources.a: --form: there is no 'Picture' (did you mean 'Pictures'",
        ),
        (
            {"sources": {"a.b": "HERE/some"}},
            "sources.a.b: a name of a source has letters, and neither dots nor slashes",
        ),
        (
            {"sources": {"a": "HERE/some", "A": "HERE/some"}},
            "sources names 'a' and 'A', which would be one name in a metric",
        ),
        (
            {"sources": {"a": {"class_path": "Pictures", "init_args": {"folder": "x"}}}},
            "sources.a.init_args of Pictures: there is no key 'folder'",
        ),
        ({"steps": ["Sise"]}, f"{STEP}: there is no 'Sise' (did you mean 'Size'?); there are "),
        ({"steps": [{"class_path": "no_such_module.Step"}]}, f"{STEP} no_such_module.Step: there is no module"),
        (
            {"steps": [{"class_path": "lit_vlm.data.Captions"}]},
            f"{STEP} lit_vlm.data.Captions: this is no subclass of lit_vlm.data.curation.step.Step",
        ),
        (
            {"steps": [{"class_path": "Size", "init_args": {"min_sides": 4}}]},
            f"{STEP}.init_args of Size: there is no key 'min_sides' (did you mean 'min_side'",
        ),
        ({"steps": [{"class_path": "Size", "min_side": 4}]}, f"{STEP}: there is no key 'min_side'"),
        ({"steps": [{"class_path": "Size", "init_args": {"min_side": "big"}}]}, f"{STEP} (Size): "),
        ({"steps": [{"class_path": "Size"}]}, f"{STEP} (Size): it drops nothing: set min_side or min_area"),
        ({"sources": {"a": {"path": "HERE", "form": 5}}}, "sources.a.form is 5; expected the name of a form"),
        ({"steps": [3]}, f"{STEP} is 3; expected {{class_path, init_args}}"),
        (
            {"steps": [{"class_path": "Score", "init_args": {"classifier": "no.such.Class", "max_score": 1}}]},
            f"{STEP} (Score): ",
        ),
    ],
)
def test_what_is_wrong_is_told_in_one_line(changes: dict[str, object], told: str, tmp_path: Path) -> None:
    file = written(tmp_path, yaml.safe_dump(GOOD | changes, allow_unicode=True, sort_keys=False))
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        read_curation(file, STEPS)
    assert told.replace("HERE", str(tmp_path)) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps: [", "cannot be read: while parsing"),
        ("[1, 2]", "holds a list; expected the keys sources, steps, seed"),
        ("", "sources is a mapping"),
        ("sources: {a: '${oc.env:NO_SUCH_VARIABLE}'}", "NO_SUCH_VARIABLE"),
    ],
)
def test_files_that_are_none_are_told_in_one_line(text: str, told: str, tmp_path: Path) -> None:
    file = written(tmp_path, text)
    with pytest.raises(ValueError, match="^[^\n]+$") as caught:
        read_curation(file, STEPS)
    assert told in str(caught.value)
    with pytest.raises(ValueError, match="there is no .*absent.yaml"):
        read_curation(tmp_path / "absent.yaml", STEPS)
