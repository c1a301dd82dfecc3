"""Interleaved documents, the forms that VILA's ablations give them, and captions in groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_vlm.data import Captions, Grouped, Mmc4, Plain, SquareCrop
from lit_vlm.data.records import Image, RecordError, Text
from lit_vlm.data.sample.collate import make_rows
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.worlds import Scenes
from tests.tiny import spec_of, tiny_vlm

SENTENCES = ["One <image> here.", "Two. ", " Three.", "Four."]


def mmc4(folder: Path, matched: list[int], **settings: Any) -> Mmc4:
    infos = [{"image_name": f"{i}.png", "matched_text_index": match} for i, match in enumerate(matched)]
    lines = [{"text_list": SENTENCES, "image_info": infos}, {"text_list": ["No image."], "image_info": []}]
    (folder / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines) + "\nnot json\n")
    return Mmc4(str(folder / "a.jsonl"), **settings)


def written(source: Mmc4, index: int = 0) -> list[str]:
    (message,) = source.record(index).messages
    return [part.text if isinstance(part, Text) else f"[{part.path}]" for part in message.content]


def test_images_stand_before_their_sentences_without_spaces_around_them(tmp_path: Path) -> None:
    assert written(mmc4(tmp_path, [2, 0, 2])) == [
        "[1.png]",
        "One <IMAGE> here. Two.",
        "[0.png]",
        "[2.png]",
        "Three. Four.",
    ]


def test_the_first_images_are_kept(tmp_path: Path) -> None:
    assert written(mmc4(tmp_path, [2, 0, 2], max_images=1)) == ["One <IMAGE> here. Two.", "[0.png]", "Three. Four."]


def test_images_first_is_the_same_text_behind_all_images(tmp_path: Path) -> None:
    found = written(mmc4(tmp_path, [2, 0, 2], items="images_first"))
    assert found == ["[1.png]", "[0.png]", "[2.png]", "One <IMAGE> here. Two.   Three. Four."]


def test_pairs_are_an_image_and_its_sentence(tmp_path: Path) -> None:
    source = mmc4(tmp_path, [2, 0, 2], items="pairs")
    assert len(source) == 4  # a line that cannot be read stays, so that it is counted
    assert [written(source, index) for index in range(3)] == [
        ["[0.png]", "Three."],
        ["[1.png]", "One <IMAGE> here."],
        ["[2.png]", "Three."],
    ]
    assert len({source.record(index).id for index in range(3)}) == 3
    with pytest.raises(RecordError, match="entry 2 is not JSON"):
        source.record(3)


def test_only_sentences_after_an_image_are_supervised(tmp_path: Path) -> None:
    (message,) = mmc4(tmp_path, [2], loss="after_image").record(0).messages
    texts = [(part.text, part.loss) for part in message.content if isinstance(part, Text)]
    assert texts == [("One <IMAGE> here. Two.", False), ("Three.", True), (" Four.", False)]


def test_settings_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_images is at least 1"):
        mmc4(tmp_path, [0], max_images=0)
    with pytest.raises(ValueError, match="after_image is for items documents"):
        mmc4(tmp_path, [0], loss="after_image", items="pairs")


def test_each_form_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    forms: list[dict[str, Any]] = [{}, {"max_images": 6}, {"items": "pairs"}, {"loss": "after_image"}]
    assert len({mmc4(tmp_path, [0], **form).fingerprint() for form in forms}) == len(forms)


def test_a_group_is_a_row_of_sequences_that_do_not_see_each_other() -> None:
    model = tiny_vlm()
    captions = Scenes("captions", 9)
    source = Grouped(captions, 4)
    assert len(source) == 2
    encode = SampleEncoder(spec_of(model), Plain(), SquareCrop(), max_length=256)
    samples = encode.sequences(source.record(1), Path())
    assert [sample.id for sample in samples] == [f"scenes_captions-1/{n}" for n in range(4)]
    for number, sample in enumerate(samples):
        text = captions.record(4 + number).messages[-1].text
        assert encode.spec.tokenizer.decode([i for i in sample.ids if i]) == f"{text}<|im_end|>"
        assert sample.image_starts == [0]
    batch = make_rows([samples])
    assert batch.segment_ids.unique().tolist() == [1, 2, 3, 4]
    assert encode.measure(source.outline(1), source) == (sum(len(sample) for sample in samples), 4)


def test_groups_follow_the_order_that_the_source_likes(tmp_path: Path) -> None:
    source = Grouped(Scenes("captions", 22), 4)
    found = source.shuffled(np.random.default_rng(0))
    source.chunked = True
    assert sorted(found.tolist()) == sorted(source.shuffled(np.random.default_rng(0)).tolist()) == list(range(5))


def test_a_group_larger_than_its_source_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,caption\na.png,a\n")
    with pytest.raises(ValueError, match="size is 4, and the source a has 1"):
        Grouped(Captions(str(tmp_path / "a.csv")), 4)
    assert isinstance(Grouped(Captions(str(tmp_path / "a.csv")), 1).record(0).messages[0].content[0], Image)
