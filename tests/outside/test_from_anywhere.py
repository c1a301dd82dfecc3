"""The four commands of docs/from_anywhere.md, over a hub on loopback, and its mixtures over a recipe."""

from __future__ import annotations

import random
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.remote.servers import DataHub, running
from tests.data.remote.test_hub import table
from tests.outside.test_your_data import TINY
from tests.runs import lit_vlm
from tests.tiny import ROOT

PAGE = (ROOT / "docs" / "from_anywhere.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line) for line in re.findall(r"^    lit-vlm (.*)$", PAGE, re.MULTILINE)]


def use(hub: DataHub, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make a server the hub of all processes to come."""
    cache = str(folder / "cache")
    for name, value in {"HF_ENDPOINT": hub.address, "HF_HUB_OFFLINE": "0", "LIT_VLM_CACHE": cache}.items():
        patch.setenv(name, value)
    patch.delenv("HF_TOKEN", raising=False)


@pytest.mark.slow
def test_four_commands_lead_from_the_hub_to_a_trained_model(
    tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = [random.Random(n).choice(("a red square", "a blue circle")) for n in range(40)]
    with running(DataHub()) as hub:
        hub.commit("ORG/NAME", {"README.md": b"---\nlicense: mit\n---\n", "data/train.parquet": table(png, *captions)})
        use(hub, tmp_path, monkeypatch)
        said = [
            lit_vlm(tmp_path, *words, *(TINY if words[0] == "run" else []), fresh=True).stdout for words in COMMANDS[:4]
        ]
    assert [words[:2] for words in COMMANDS[:4]] == [
        ["data", "list"], ["data", "convert"], ["run", "quickstart"], ["compare", "my-run"]]  # fmt: skip
    listed, converted, trained, compared = said
    assert "licence: mit" in listed
    assert "lit-vlm data convert hf://datasets/ORG/NAME#default/train OUT" in listed
    assert re.search(r"records +│ 40", converted)
    assert "held-out questions" in trained
    assert "held_out/loss" in compared


@pytest.mark.slow
def test_a_mixture_lies_over_a_recipe(
    tmp_path: Path, png: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (words,) = (words for words in COMMANDS if "recipes/data/the_cauldron.yaml" in words)
    names = re.findall(r"the_cauldron#(\w+)/", (ROOT / "recipes" / "data" / "the_cauldron.yaml").read_text())
    one = table(png, "one", "two")
    with running(DataHub()) as hub:
        hub.commit("HuggingFaceM4/the_cauldron", {
            "README.md": ("---\nconfigs:\n" + "".join(
                f"- config_name: {name}\n  data_files:\n  - split: train\n    path: {name}/train-*\n" for name in names
            ) + "---\n").encode(),
            **{f"{name}/train-00000-of-00001.parquet": one for name in names}})  # fmt: skip
        use(hub, tmp_path, monkeypatch)
        config = [str(ROOT / word) if word.startswith("recipes/") else word for word in words]
        said = lit_vlm(tmp_path, *config, "--scale", "tiny", "--dry-run", fresh=True).stdout
    assert "data.train (ai2d 2, aokvqa 2, chart2text 2, chartqa 2, and 46 more" in said
