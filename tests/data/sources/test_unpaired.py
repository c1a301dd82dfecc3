"""Images and texts that do not belong together."""

from __future__ import annotations

import pytest

from lit_vlm.core.tokenizers import load_tokenizer
from lit_vlm.data import RandomWords, Unpaired
from lit_vlm.data.records import Image, RecordError, Text
from lit_vlm.worlds import Scenes


def test_each_image_gets_a_text_of_another_source() -> None:
    pictures, texts = Scenes("captions", 20), Scenes("text", 5, turns=2)
    source = Unpaired(pictures, texts)
    known = {"\n".join(message.text.strip() for message in texts.outline(i).messages) for i in range(5)}
    assert len(source) == 20
    seen = set()
    for index in range(20):
        record = source.record(index)
        (message,) = record.messages
        image, text = message.content
        assert isinstance(image, Image)
        assert image.data == pictures.record(index).images[0].data
        assert isinstance(text, Text)
        seen.add(text.text)
        assert source.outline(index).messages[0].content[1] == text
    assert seen == known
    assert source.fingerprint() == Unpaired(pictures, texts).fingerprint() != Unpaired(pictures, texts, 1).fingerprint()


def test_a_record_without_image_is_a_bad_one() -> None:
    source = Unpaired(Scenes("text", 3), Scenes("text", 3))
    with pytest.raises(RecordError, match="no_image"):
        source.record(0)


def test_random_words_are_close_to_uniform_and_always_the_same() -> None:
    source = RandomWords("bytes", length=200, count=50)
    assert source.record(3) == RandomWords("bytes", length=200, count=50).record(3)
    tokenizer = load_tokenizer("bytes")
    ids = [token for i in range(50) for token in tokenizer(source.record(i).messages[0].text).input_ids]
    assert len(set(ids)) > 120
