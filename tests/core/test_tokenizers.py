"""Text of tokens that come one by one."""

from __future__ import annotations

import pytest

from lit_vlm.core.tokenizers import IncrementalText, byte_tokenizer, decoded


@pytest.mark.parametrize("text", ["A cat.", "  spaces  around  ", "日本語 and 🐈!", "", " ", "line\nbreaks\n\n"])
def test_pieces_together_are_the_whole_text(text: str) -> None:
    tokenizer = byte_tokenizer()
    growing = IncrementalText(tokenizer)
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = [growing.push(token) for token in ids] + [growing.rest()]
    assert "".join(pieces) == text.strip()
    assert growing.num_tokens == len(ids)
    assert not any("\ufffd" in piece for piece in pieces)


OPENING = "<think>\n\n</think>"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"{OPENING}\n\nA cat.", "A cat."),
        (f"{OPENING}", ""),
        ("<think>\n\n", "<think>"),
        ("<think> it is", "<think> it is"),
        ("A cat.", "A cat."),
        (f"A cat. {OPENING}", f"A cat. {OPENING}"),
    ],
)
def test_what_all_answers_begin_with_is_no_part_of_them(text: str, answer: str) -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert decoded(tokenizer, ids, OPENING) == answer
    growing = IncrementalText(tokenizer, OPENING)
    assert "".join([*(growing.push(token) for token in ids), growing.rest()]) == answer


def test_letters_wait_for_their_last_byte_and_half_of_one_is_said_at_the_end() -> None:
    tokenizer = byte_tokenizer()
    growing = IncrementalText(tokenizer)
    cat = tokenizer.encode("🐈", add_special_tokens=False)
    assert [growing.push(token) for token in cat] == ["", "", "", "🐈"]
    assert growing.push(cat[0]) == ""
    assert growing.rest() == "\ufffd"


def test_special_tokens_are_left_out() -> None:
    tokenizer = byte_tokenizer()
    growing = IncrementalText(tokenizer)
    assert growing.push(tokenizer.eos_token_id) + growing.rest() == ""
    assert growing.num_tokens == 1
