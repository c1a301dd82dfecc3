"""The shipped curations: on tiny sources, with smaller numbers and a tiny encoder, they keep what their papers keep."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image as PILImage

from lit_vlm.data.curation import STEPS, DualEncoder, curate, read_curation
from lit_vlm.data.curation.step import Step
from lit_vlm.data.sources import Converted
from tests.data.curation.dual import save_clip
from tests.data.curation.planted import encoded
from tests.tiny import ROOT

RECIPES = ROOT / "recipes" / "curation"
CAPTIONS = ("a red circle", "a blue square", "two red squares", "circle")


def write_tar(folder: Path, pictures: list[bytes]) -> None:
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for index, content in enumerate(pictures):
            for suffix, data in (("png", content), ("txt", CAPTIONS[index % 4].encode())):
                info = tarfile.TarInfo(f"{index:09d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def write_mmc4(folder: Path, documents: int) -> None:
    folder.mkdir()
    lines = []
    for index in range(documents):
        names = [f"{index}-{number}.png" for number in range(index % 8 + 1)]
        for number, name in enumerate(names):
            (folder / name).write_bytes(encoded(seed=10 * index + number))
        infos = [{"image_name": name, "matched_text_index": n % 4} for n, name in enumerate(names)]
        lines.append(json.dumps({"text_list": list(CAPTIONS), "image_info": infos}))
    (folder / "docs.jsonl").write_text("\n".join(lines))


def made(name: str, folder: Path, **smaller: Any) -> tuple[dict[str, Any], Path]:
    """Curate by a recipe whose encoder is tiny and some of whose numbers are smaller: the report, and the folder."""
    raw = yaml.safe_load((RECIPES / name).read_text(encoding="utf-8"))
    encoder = save_clip(folder / "clip")
    for step in raw["steps"]:
        arguments = step["init_args"]
        arguments |= {key: value for key, value in smaller.items() if key in arguments}
        if "encoder" in arguments:
            arguments["encoder"] = encoder
    file = folder / name
    file.write_text(yaml.safe_dump(raw))
    curation = read_curation(file, STEPS)
    return curate(curation, folder / "out", folder / "m"), folder / "out"


def test_eve_takes_the_pictures_nearest_to_each_centre_of_those_that_are_large(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [(447, 600), (600, 447)] + [(448, 448)] * 10
    rng = np.random.default_rng(0)
    pictures = []
    for size in sizes:
        buffer = io.BytesIO()
        small = PILImage.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        small.resize(size).save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    write_tar(tmp_path / "laion", pictures)
    monkeypatch.setenv("LAION", str(tmp_path / "laion"))
    report, _ = made("eve_laion.yaml", tmp_path, clusters=2, nearest=2)
    size, clusters = report["steps"]
    assert (size["in"], size["dropped"], clusters["in"]) == (12, {"min_side": 2}, 10)
    assert clusters["kept"] + clusters["dropped"]["far_from_centre"] == 10
    assert 3 <= report["kept"] <= 4  # two of each cluster, or one of a cluster of one


def test_vila_takes_the_most_similar_pairs_of_coyo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [encoded(seed=seed) for seed in range(12)]
    write_tar(tmp_path / "coyo", pictures)
    monkeypatch.setenv("COYO_ALL", str(tmp_path / "coyo"))
    report, out = made("vila_coyo.yaml", tmp_path, top=5)
    encoder = DualEncoder(str(tmp_path / "clip"))
    opened = [PILImage.open(io.BytesIO(content)).convert("RGB") for content in pictures]
    images = encoder.embed(encoder.picture_inputs(opened))
    texts = encoder.embed(encoder.text_inputs([CAPTIONS[index % 4] for index in range(12)]))
    best = np.argsort(-(images * texts).sum(1))[:5]
    assert report["kept"] == 5
    kept = Converted(str(out))
    assert {kept.record(i).images[0].data for i in range(5)} == {pictures[index] for index in best}


def test_vila_takes_documents_of_mmc4_with_their_first_six_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mmc4(tmp_path / "mmc4", 8)
    monkeypatch.setenv("MMC4_ALL", str(tmp_path / "mmc4"))
    report, out = made("vila_mmc4.yaml", tmp_path, top=7)
    assert report["steps"][0]["dropped"] == {"low_similarity": 1}
    kept = Converted(str(out))
    pictures = sorted(len(kept.record(index).images) for index in range(7))
    assert max(pictures) == 6
    assert sum(pictures) in {1 + 2 + 3 + 4 + 5 + 6 + 6 + 6 - one for one in range(1, 7)}


def test_shipped_files_name_steps_with_arguments_that_these_have() -> None:
    files = sorted(RECIPES.glob("*.yaml"))
    assert [file.stem for file in files] == ["eve_laion", "vila_coyo", "vila_mmc4"]
    for file in files:
        for step in yaml.safe_load(file.read_text(encoding="utf-8"))["steps"]:
            kind: type[Step] = STEPS[step["class_path"]]
            assert set(step["init_args"]) <= set(kind.__init__.__annotations__)
