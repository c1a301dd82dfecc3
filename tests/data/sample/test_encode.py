"""Encoding: which records are refused, and which tokenizers a template can be written for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data.records import Message, Record, RecordError, Text
from lit_vlm.data.sample.collate import collate_prompts
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.pieces import encode_pieces
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.templates import ChatML, Llama3, Phi3, Plain, Template, VicunaV1
from lit_vlm.data.sample.transforms import Native
from lit_vlm.worlds import Shapes
from tests.conftest import make_spec
from tests.data.made_tokenizers import byte_level

QUESTION = Message("user", (Text("Q"),))
BLANK = [(), (Text(""),), (Text(" \n"),), (Text("", loss=False), Text(" "))]


def encoder(spec: InputSpec, template: Template | None = None) -> SampleEncoder:
    return SampleEncoder(spec, template or ChatML(), Native(64), 1000)


@pytest.mark.parametrize("content", BLANK, ids=str)
@pytest.mark.parametrize("place", range(3))
def test_an_answer_that_holds_nothing_is_refused(content: tuple[Text, ...], place: int, bytes_spec: InputSpec) -> None:
    answers = [Message("assistant", content if index == place else (Text("yes"),)) for index in range(3)]
    record = Record("a", "made", tuple(turn for answer in answers for turn in (QUESTION, answer)))
    encode = encoder(bytes_spec)
    for refusing in (lambda: encode(record, Path()), lambda: encode.measure(record, Shapes(1))):
        with pytest.raises(RecordError, match=rf"empty_answer: messages\[{2 * place + 1}\], an answer, holds neither"):
            refusing()
    # What the assistant said before, or what is expected of it, may be nothing; and so may one of several choices.
    assert replace(encode, prompt=True)(record, Path()).ids
    assert encode(replace(record, options=("yes", answers[place].text)), Path()).num_supervised > 0


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (ChatML(), r"ChatML writes <\|im_start\|>, <\|im_end\|>"),
        (Llama3(), r"Llama3 writes <\|start_header_id\|>, <\|end_header_id\|>, <\|eot_id\|>"),
        (Phi3(), r"Phi3 writes <\|system\|>, <\|end\|>, <\|user\|>, <\|assistant\|>"),
    ],
    ids=["chatml", "llama3", "phi3"],
)
def test_a_template_whose_marks_the_tokenizer_lacks_is_refused(
    template: Template, marks: str, llama_spec: InputSpec, caplog: pytest.LogCaptureFixture
) -> None:
    written = SampleFormat(template, Native(64), 1000, fast_jpeg=False)
    for _ in range(2):
        with pytest.raises(
            ValueError, match=rf"{marks} as one token each, .* tokenizer \(.*tiny_llama\) knows .*new_tokens '\["
        ):
            written.check_marks(llama_spec, "refuse")
    assert not caplog.records


def test_a_trained_model_with_marks_in_letters_is_asked_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    spec = make_spec(byte_tokenizer())
    written = SampleFormat(Phi3(), Native(64), 1000, fast_jpeg=False)
    for _ in range(2):
        written.check_marks(spec, "warn")
        assert written.sample_encoder(spec)(Shapes(1).record(0), Path()).ids
    (record,) = caplog.records
    assert record.message.startswith("data.template Phi3 writes <|system|>, <|end|>, <|user|>, <|assistant|> as one")
    assert "new_tokens" not in record.message  # the vocabulary of a checkpoint stays as it is
    with pytest.raises(ValueError, match=r"Phi3 writes <\|system\|>, <\|end\|>"):
        written.check_marks(spec, "refuse")


def test_a_template_that_closes_with_an_end_of_sequence_token_needs_one() -> None:
    spec = make_spec(PreTrainedTokenizerFast(tokenizer_object=byte_level(), name_or_path="some/base"))
    for template in (VicunaV1(), Plain(end=None)):
        with pytest.raises(ValueError, match=r"\(some/base\) has none: set eos_token in its tokenizer_config.json"):
            SampleFormat(template, Native(64), 1000, fast_jpeg=False).check_marks(spec, "refuse")
    SampleFormat(Plain(), Native(64), 1000, fast_jpeg=False).check_marks(spec, "refuse")


def test_marks_in_letters_are_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    spec = make_spec(byte_tokenizer())
    for _ in range(2):
        encode_pieces(Phi3().render([QUESTION, Message("assistant", (Text("A"),))], ""), spec)
    (record,) = caplog.records
    assert record.message.startswith("the template writes <|user|>, <|end|>, <|assistant|> as one token each, and the")


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (ChatML(), "<|im_end|>"),
        (Llama3(), "<|eot_id|>"),
        (VicunaV1(), "<|im_end|>"),
        (Plain(), "Ċ"),
        (Plain(end=None), "<|im_end|>"),
    ],
    ids=["chatml", "llama3", "vicuna", "plain", "plain with the end of sequence"],
)
def test_a_prompt_knows_what_closes_its_answer(template: Template, end: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], special_tokens=True)
    encode = replace(encoder(make_spec(tokenizer), template), prompt=True)
    record = Shapes(1).record(0)
    batch = collate_prompts([encode(record, Path())])
    assert tokenizer.convert_ids_to_tokens(sorted(batch.stop_ids)) == [end]
    assert replace(encode, prompt=False)(record, Path()).stop_ids == frozenset()


def test_a_text_that_closes_an_answer_in_several_tokens_stops_nothing(bytes_spec: InputSpec) -> None:
    encode = replace(encoder(bytes_spec, Plain(end=" #")), prompt=True)
    assert encode(Shapes(1).record(0), Path()).stop_ids == frozenset()
