"""Tags and names that runs get from the environment."""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_vlm.training.run_tags import RUN_TAGS, for_children, given_tags, run_name, stage_name
from lit_vlm.training.tracking import MLflow


def test_what_is_given_to_children_is_what_they_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"variant": "no-pal, größer", "seed": "3", "flags": "--a '{\"b\": 1}'"}
    for key, value in for_children(tags).items():
        monkeypatch.setenv(key, value)
    assert given_tags() == tags


def test_numbers_are_taken_as_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RUN_TAGS, '{"seed": 3, "lr": 0.001, "shared": true}')
    assert given_tags() == {"seed": "3", "lr": "0.001", "shared": "true"}


@pytest.mark.parametrize("text", ["variant=base", "[1]", '{"variant": null}', '{"variant": {"a": 1}}', '{"variant'])
def test_a_value_that_is_no_object_of_tags_is_refused(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RUN_TAGS, text)
    with pytest.raises(ValueError, match="LIT_VLM_RUN_TAGS is a JSON object of texts and numbers.*correct or unset it"):
        MLflow(f"sqlite:///{tmp_path}/m.db")


def test_a_run_is_named_as_its_folder_and_a_stage_after_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert (run_name(Path("runs/eve-a")), stage_name(Path("runs/align"))) == ("eve-a", "align")
    monkeypatch.setenv(RUN_TAGS, '{"run": "pal/base/seed-0"}')
    assert run_name(Path("out/runs/base/seed-0")) == "pal/base/seed-0"
    assert stage_name(Path("out/stages/1_align-ab12")) == "pal/base/seed-0/1_align-ab12"
