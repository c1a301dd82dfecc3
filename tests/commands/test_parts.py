"""The lists of all that can be named."""

from __future__ import annotations

from pathlib import Path

import pytest

import callbacks
from lit_vlm import encoders, heads, projectors
from lit_vlm.commands.cli import VERBS, main
from lit_vlm.commands.parts import KINDS
from lit_vlm.commands.recipe import shipped_recipes
from lit_vlm.core.plugins import VARIABLE
from lit_vlm.data.curation import STEPS
from lit_vlm.evaluation.tasks import TASKS
from tests.runs import lit_vlm
from tests.tiny import ROOT


def listed(kind: str) -> dict[str, tuple[str, str]]:
    (entries,) = [one.entries for one in KINDS if one.title == kind]
    own = ("", "lit_vlm", "callbacks")  # other tests define classes, too
    return {entry.name: (entry.about, entry.path) for entry in entries() if entry.path.split(".")[0] in own}


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("encoders", set(encoders.__all__) - {"Encoder", "PatchGrid"}),
        ("projectors", set(projectors.__all__) - {"Projector", "PerceiverLayer"}),
        ("heads", set(heads.__all__) - {"WORDS", "Head", "Tap", "Normaliser", "CountName"}),
        ("callbacks", set(callbacks.__all__)),
        ("steps", set(STEPS)),
        ("tasks", set(TASKS)),
        ("verbs", {*VERBS, "fit", "validate", "test", "predict"}),
        ("recipes", set(shipped_recipes())),
    ],
)
def test_every_list_is_whole(kind: str, names: set[str]) -> None:
    assert set(listed(kind)) == names


@pytest.mark.parametrize("kind", [kind.title for kind in KINDS])
def test_every_entry_says_what_it_is(kind: str) -> None:
    entries = listed(kind)
    assert entries
    assert [name for name, (about, _) in entries.items() if len(about) < 8] == []


def test_the_page_is_that_of_the_command(tmp_path: Path) -> None:
    # In a process of its own: other tests define classes, which would be listed.
    printed = lit_vlm(tmp_path, "parts", "--markdown").stdout
    page = (ROOT / "docs" / "parts.md").read_text()
    assert page.endswith(printed), "lit-vlm parts --markdown gives another page: write it anew"


def test_a_package_s_own_stand_among_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_lab_parts.py").write_text(
        "from lit_vlm.commands.verb import Verb\n"
        "from lit_vlm.projectors import Linear\n\n\n"
        'class Twice(Linear):\n    """A linear layer, twice."""\n\n\n'
        "class Greet(Verb):\n"
        "    name = 'greet'\n    about = 'say hello'\n\n"
        "    def main(self, argv):\n"
        "        if not argv:\n            raise ValueError('greet whom?')\n"
        "        print('hello', *argv)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(VARIABLE, "")
    main(["parts", "projectors", "--plugins", "my_lab_parts"])
    assert "A linear layer, twice my_lab_parts.Twice" in capsys.readouterr().out
    main(["greet", "you"])
    assert capsys.readouterr().out == "hello you\n"
    main(["my_lab_parts.Greet", "all"])
    assert capsys.readouterr().out == "hello all\n"
    with pytest.raises(SystemExit):
        main(["greet"])
    assert "error: greet whom?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parts", "encoder"], "there is no list 'encoder' (did you mean 'encoders"),
        (["evalute"], "there is no 'evalute' (did you mean 'evaluate"),
        (["my_lab.nothing.There"], "there is no module 'my_lab'"),
    ],
)
def test_a_misspelt_name_is_answered_with_the_nearest(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(words)
    assert message in capsys.readouterr().err
