"""Labels and typed marks, for tokenizers of every kind."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lit_vlm.core.batch import IGNORE
from lit_vlm.data.sample.encode import encode_pieces
from lit_vlm.data.sample.spelling import spelling_of
from lit_vlm.data.sample.templates import Span
from tests.conftest import make_spec
from tests.data.made_tokenizers import CLOSE, EOS, LOSSLESS, MADE, OPEN, SPECIAL, TURN, made

EVERY = ("bytes", *MADE)
WORDS = [
    " ", "  ", "\n", "\n\n", "\t", "a", "cat", "Cat", " two", "rivière", "日本", "𠀋", "🙂", "👩‍👩‍👧", "🇯🇵",
    "e\u0301", "\u0301", "ﬁ", "①", "q", "x", "USER:", "1,5", "don't", "<", "▁", "Ġ", "\u200b", "\u00a0", "\ufeff",
    "ø", "İ", "ß",
]  # fmt: skip


def is_plain(text: str) -> bool:
    """Whether no special token is in a text: hypothesis also draws strings that stand in the code."""
    return text.isprintable() and not any(mark.lower() in text.lower() for mark in SPECIAL)


TEXT = st.one_of(st.lists(st.sampled_from(WORDS), max_size=12).map("".join), st.text(max_size=12).filter(is_plain))
TYPED = st.lists(
    st.sampled_from([*WORDS, *SPECIAL, "<|IM_END|>", "</S>", "<|im_", "end|>", "</", "s>"]), max_size=12
).map("".join)
SEARCH = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def turn(question: str, answer: str) -> list[Span]:
    """Marks are cut out of a text before anything else, so where the answer's tokens begin and end is known."""
    asked = [Span(OPEN, mark=True), Span(question, typed=True), Span(TURN, mark=True)]
    return [*asked, Span(answer, True, typed=True), Span(CLOSE, True, mark=True)]


@pytest.mark.parametrize("name", EVERY)
@given(question=TEXT, answer=TEXT)
@SEARCH
def test_all_tokens_of_an_answer_are_supervised_and_no_other(name: str, question: str, answer: str) -> None:
    tokenizer = made(name)
    spans = turn(question, answer) + turn(answer, question)
    ids, labels = encode_pieces(spans, make_spec(tokenizer))
    assert ids == tokenizer("".join(span.text for span in spans), add_special_tokens=False).input_ids
    begin, end = tokenizer.convert_tokens_to_ids([TURN, CLOSE])
    expected, inside = [], False
    for token in ids:
        expected.append(token if inside else IGNORE)
        inside = token == begin or (inside and token != end)
    assert labels == expected


@pytest.mark.parametrize("name", LOSSLESS)
@given(parts=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=5))
@SEARCH
def test_a_token_is_supervised_where_it_holds_a_byte_of_a_supervised_character(
    name: str, parts: list[tuple[str, bool]]
) -> None:
    tokenizer = made(name)
    ids, labels = encode_pieces([Span(text, loss, typed=True) for text, loss in parts], make_spec(tokenizer))
    # Tokens are the text's bytes one after the other, so their places follow from their lengths alone.
    marked = b"".join(bytes([loss]) * len(text.encode()) for text, loss in parts)
    place = 0
    for token, label in zip(ids, labels, strict=True):
        length = len(tokenizer.convert_ids_to_tokens(token))
        assert label == (token if 1 in marked[place : place + length] else IGNORE)
        place += length
    assert place == len(marked)


@pytest.mark.parametrize("name", EVERY)
@given(question=TYPED, answer=TYPED)
@SEARCH
def test_marks_that_people_type_stay_letters(name: str, question: str, answer: str) -> None:
    tokenizer = made(name)
    ids, labels = encode_pieces(turn(question, answer), make_spec(tokenizer))
    unknown = tokenizer.unk_token_id
    marks = [token for token in ids if token in spelling_of(tokenizer).marks and token != unknown]
    assert marks == tokenizer.convert_tokens_to_ids([OPEN, TURN, CLOSE])
    begin = ids.index(marks[1]) + 1
    assert labels == [IGNORE] * begin + ids[begin:]
    if name in LOSSLESS:
        assert tokenizer.decode(ids[begin:-1]) == answer


@pytest.mark.parametrize("name", EVERY)
def test_a_typed_mark_is_written_as_letters_like_it_and_its_neighbours_as_ever(name: str) -> None:
    tokenizer = made(name)
    spec = make_spec(tokenizer)
    ids, _ = encode_pieces(turn("the cat", f"the cat {EOS} sat"), spec)
    plain, _ = encode_pieces(turn("the cat", "the cat"), spec)
    assert ids[: len(plain) - 1] == plain[:-1]
    mark = tokenizer.convert_tokens_to_ids(EOS)
    assert mark not in ids
    tokens, _ = encode_pieces([Span(f"the cat {EOS} sat", True)], spec)
    assert tokens.count(mark) == 1


def test_a_special_token_that_swallows_spaces_is_no_part_of_the_answer() -> None:
    spans = [Span("the cat"), Span(TURN, mark=True), Span("  sat", True), Span(CLOSE, True, mark=True)]
    tokenizer = made("greedy marks")
    ids, labels = encode_pieces(spans, make_spec(tokenizer))
    begin = ids.index(tokenizer.convert_tokens_to_ids(TURN))
    assert labels == [IGNORE] * (begin + 1) + ids[begin + 1 :]


def test_tokens_that_are_no_special_ones_are_the_same_in_what_people_type() -> None:
    tokenizer = made("llama3")  # it has words of several spaces beside its vocabulary
    text = f"a    cat {EOS} and    spaces"
    ids, _ = encode_pieces([Span(text, typed=True)], make_spec(tokenizer))
    assert ids.count(tokenizer.convert_tokens_to_ids("    ")) == 2
    assert tokenizer.decode(ids) == text
