"""The processor and the chat template: chats as transformers writes them are the prompts of the kit."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from lit_vlm.core.tokenizers import stand_in
from lit_vlm.data import ChatML, Fuyu, Llama3, Phi3, Plain, Template, VicunaV1
from lit_vlm.data.records import Image as Picture
from lit_vlm.data.records import Message, Text
from lit_vlm.data.sample.chat_template import IMAGE_MARK, as_jinja
from lit_vlm.data.sample.pieces import encode_pieces
from lit_vlm.data.sample.templates import Piece, Span, content_of
from lit_vlm.hf.processor import LitVLMProcessor
from tests.exports import exported
from tests.tiny import spec_of, tiny_vlm

TEMPLATES: list[Template] = [
    ChatML(), ChatML(system="Be brief."), Llama3(), Phi3(), VicunaV1(), VicunaV1(system=""),
    VicunaV1(image_marks=("<img>", "</img>")), Plain(), Plain(end=None, after_image="\n", image_marks=("[", "]")),
    Fuyu(), Fuyu(system="Be brief."),
]  # fmt: skip
PICTURE = Picture(path="a.png")


def chat(messages: list[Message]) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [
                {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image"}
                for part in message.content
            ],
        }
        for message in messages
    ]


CONVERSATIONS = [
    [Message("user", (PICTURE, Text("What?"))), Message("assistant", (Text('A "cone"\n{{ x }} {% y %} \\n ü.'),))],
    [Message("system", (Text("Say little."),)), Message("user", (Text("One "), PICTURE, Text(" two "), PICTURE))],
    [Message("user", (Text("No picture"),))],
    [Message("system", (Text(""),)), Message("user", (PICTURE, Text("What?")))],
    [
        Message("user", (PICTURE, Text(" padded "))),
        Message("assistant", (Text(" Yes "),)),
        Message("user", (Text("So?"),)),
        Message("assistant", (Text("No."),)),
        Message("user", (Text("And?"),)),
    ],
]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: f"{type(t).__name__}-{TEMPLATES.index(t)}")
def test_the_chat_template_writes_what_the_template_writes(template: Template) -> None:
    tokenizer = stand_in()
    tokenizer.chat_template = as_jinja(template, "<|im_end|>", "")
    written = 0
    for messages in CONVERSATIONS:
        asked = messages[-1].role == "user"
        if isinstance(template, Plain) and len(messages) > 2 and messages[0].role != "system":
            continue  # it takes one question
        pieces = template.prompt(messages, "<|im_end|>") if asked else template.render(messages, "<|im_end|>")
        expected = "".join(piece.text if isinstance(piece, Span) else IMAGE_MARK for piece in pieces)
        if isinstance(template, Plain) and not any(isinstance(piece, Picture) for piece in pieces):
            continue  # nothing is left of a question without a picture
        found = tokenizer.apply_chat_template(chat(messages), tokenize=False, add_generation_prompt=asked)
        assert found == expected
        written += 1
    assert written


def test_a_prompt_is_the_start_of_the_whole_conversation() -> None:
    for template in (one for one in TEMPLATES if not isinstance(one, Plain)):
        tokenizer = stand_in()
        tokenizer.chat_template = as_jinja(template, "<|im_end|>", "")
        whole = tokenizer.apply_chat_template(chat(CONVERSATIONS[0]), tokenize=False)
        prompt = tokenizer.apply_chat_template(chat(CONVERSATIONS[0][:1]), tokenize=False, add_generation_prompt=True)
        assert whole.startswith(prompt)


@pytest.mark.parametrize(
    ("messages", "match"),
    [
        ([{"role": "assistant", "content": "Hello."}], "must alternate"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "must alternate"),
        ([{"role": "user", "content": [{"type": "video"}]}], "takes text and images, not video"),
    ],
)
def test_what_a_template_cannot_write_is_refused(messages: Any, match: str) -> None:
    tokenizer = stand_in()
    tokenizer.chat_template = as_jinja(ChatML(), "<|im_end|>", "")
    with pytest.raises(Exception, match=match):
        tokenizer.apply_chat_template(messages, tokenize=False)
    tokenizer.chat_template = as_jinja(Plain(), "<|im_end|>", "")
    with pytest.raises(Exception, match="Plain takes one question"):
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2, tokenize=False
        )


def test_marks_that_hold_the_mark_of_an_image_are_refused() -> None:
    with pytest.raises(ValueError, match="image_marks hold <image>, which stands for a picture"):
        as_jinja(VicunaV1(image_marks=("<image>", "</image>")), "</s>", "")


class Numbered(Template):
    """Writes the number of each turn, which no chat template found by placeholders can."""

    def _turns(self, system: Any, turns: Any, eos: str) -> Iterator[Piece]:
        for index, message in enumerate(turns):
            yield Span(f"{index}: ")
            yield from content_of(message, message.role == "assistant")
            yield Span(eos, message.role == "assistant", mark=True)


def test_a_template_that_depends_on_the_turn_is_refused() -> None:
    with pytest.raises(ValueError, match="template Numbered writes turns differently by their place"):
        as_jinja(Numbered(), "</s>", "")


# ------------------------------------------------------------------ the processor


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LitVLMProcessor:
    out = tmp_path_factory.mktemp("hf") / "out"
    exported(out, "llava15")
    return LitVLMProcessor.from_pretrained(out)


def pixels(height: int = 30, width: int = 40) -> Image.Image:
    return Image.fromarray(np.arange(height * width * 3, dtype=np.int64).astype(np.uint8).reshape(height, width, 3))


def test_letters_of_special_tokens_stay_letters_in_a_chat(processor: LitVLMProcessor) -> None:
    said = "Ignore <|im_end|> and <pad>."
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": said}], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    ids = inputs["input_ids"][0]
    special = set(processor.tokenizer.all_special_ids)
    assert said in processor.tokenizer.decode([token for token in ids if token not in special])
    # As plain text they are tokens, as with any processor of transformers.
    plain = processor(text=said)["input_ids"][0]
    assert len(plain) < len(said)


def test_the_letters_of_an_image_s_mark_are_letters_in_a_part_of_a_message(processor: LitVLMProcessor) -> None:
    said = "what is <image> in html?"
    parts = [{"type": "image", "image": pixels()}, {"type": "text", "text": said}]
    inputs = processor.apply_chat_template([{"role": "user", "content": parts}], tokenize=True, return_dict=True)
    ids = [token for token in inputs["input_ids"][0] if token not in processor.tokenizer.all_special_ids]
    assert said in processor.tokenizer.decode(ids)
    assert len(inputs["image_sizes"][0]) == 1
    for wrong in ("no part", {"text": "no type"}, {"type": "text", "text": None}):
        with pytest.raises(ValueError, match="is text, or a list of parts"):
            processor.apply_chat_template([{"role": "user", "content": [wrong]}], tokenize=True)
    with pytest.raises(ValueError, match="says that it is text and has none"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "text"}]}], tokenize=True)


def test_pictures_come_in_any_form(processor: LitVLMProcessor, tmp_path: Path) -> None:
    picture = pixels()
    picture.save(tmp_path / "a.png")
    array = np.asarray(picture)
    forms = [
        picture,
        array,
        torch.from_numpy(array.copy()),
        np.moveaxis(array, -1, 0),
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
    ]
    found = [processor(images=form, text="<image> Hm.")["pixel_values"] for form in forms]
    assert all(torch.equal(one, found[0]) for one in found)
    data = (tmp_path / "a.png").read_bytes()
    text = base64.b64encode(data).decode()
    for form in (
        data,
        {"bytes": data, "path": None},
        {"path": str(tmp_path / "a.png")},
        text,
        f"data:image/png;base64,{text}",
    ):
        assert torch.equal(processor(images=form, text="<image> Hm.")["pixel_values"], found[0])
    turned = picture.copy()
    turned.getexif()[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.png", exif=turned.getexif())
    upright = processor(images=tmp_path / "turned.png", text="<image>")["pixel_values"]
    assert torch.equal(processor(images=Image.open(tmp_path / "turned.png"), text="<image>")["pixel_values"], upright)
    assert not torch.equal(upright, found[0])
    clear = Image.new("RGBA", (30, 30), (9, 9, 9, 0))  # transparent: white, as in training
    assert int(processor(images=clear, text="<image>")["pixel_values"].min()) == 255


def test_pictures_of_a_batch_are_nested_or_flat(processor: LitVLMProcessor) -> None:
    texts = ["<image> one <image>", "none", "<image>"]
    images = [pixels(30 + 7 * index) for index in range(3)]
    flat = processor(images=images, text=texts, return_tensors="pt")
    nested = processor(images=[images[:2], [], images[2:]], text=texts, return_tensors="pt")
    assert all(torch.equal(flat[name], nested[name]) for name in flat)
    assert flat["image_sizes"].sum(-1).bool().tolist() == [[True, True], [False, False], [True, False]]
    assert flat["pixel_values"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"text": "<image>"}, "text 0 has 1 <image> marks and 0 pictures"),
        ({"text": "no mark", "images": "P"}, "1 pictures for 0 <image> marks"),
        ({"text": ["<image>", "<image>"], "images": [["P"]]}, "pictures of 1 texts for 2 texts"),
        ({"text": ["<image>", "a"], "images": [[], ["P"]]}, "text 0 has 1 <image> marks and 0 pictures"),
        ({"images": "P"}, "give text"),
        ({"text": "a", "do_resize": True}, "has no argument do_resize"),
        ({"text": "a", "videos": ["a.mp4"], "audios": []}, "videos: this model is shown pictures alone"),
        ({"text": "a", "audio": [[0.0]]}, "audio: this model is shown pictures alone"),
        ({"text": "a" * 50, "truncation": True, "max_length": 20}, "50 positions do not fit max_length 20"),
        ({"text": "<image>", "images": np.zeros((4, 4, 3))}, "a picture cannot be used: .*must be uint8"),
        ({"text": "<image>", "images": np.zeros((5, 5, 2), np.uint8)}, "a picture cannot be used: .*must be uint8"),
        ({"text": "<image>", "images": 5}, "int is no form that pictures come in"),
        ({"text": "<image>", "images": "nowhere.png"}, "there is no picture nowhere.png"),
        ({"text": "<image>", "images": "x" * 9000}, "cannot be used"),
        ({"text": []}, "text must be a text or a list of texts"),
        ({"text": [None]}, "text must be a text or a list of texts"),
        ({"text": ["a", ""]}, "text 1 is empty"),
        ({"text": ["a", "bc"], "padding": False, "return_tensors": "pt"}, "make no tensor without padding"),
        ({"text": "a", "return_tensors": "np"}, "return_tensors is 'np'; LitVLMProcessor takes None, 'pt'"),
        ({"text": "a", "padding": "max"}, "padding is 'max'"),
        ({"text": "a", "padding_side": "lef"}, "padding_side is 'lef'"),
    ],
)
def test_wrong_calls_are_named(processor: LitVLMProcessor, arguments: dict[str, Any], match: str) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(one) for one in value]
        return pixels() if isinstance(value, str) and value == "P" else value

    arguments = {key: filled(value) if key == "images" else value for key, value in arguments.items()}
    with pytest.raises(ValueError, match=match):
        processor(**arguments)


def test_long_prompts_and_answer_masks(processor: LitVLMProcessor) -> None:
    with pytest.warns(UserWarning, match=r"\d+ positions; the model was trained on \d+ at most"):
        processor(text="a" * (processor.max_length + 1))
    with pytest.raises(ValueError, match="marks no answers"):
        processor.apply_chat_template(chat(CONVERSATIONS[2]), tokenize=True, return_assistant_tokens_mask=True)


def test_padding(processor: LitVLMProcessor) -> None:
    texts = ["abc", "a"]
    left = processor(text=texts)
    assert left["attention_mask"] == [[1, 1, 1], [0, 0, 1]]
    assert processor(text=texts, padding_side="right")["attention_mask"] == [[1, 1, 1], [1, 0, 0]]
    assert [len(row) for row in processor(text=texts, padding=False)["input_ids"]] == [3, 1]
    assert [len(row) for row in processor(text=texts, padding="max_length", max_length=7)["input_ids"]] == [7, 7]
    assert processor.batch_decode(left["input_ids"], skip_special_tokens=True) == texts


def test_a_tokenizer_with_a_token_in_front(processor: LitVLMProcessor, tmp_path: Path) -> None:
    """It is written once, whether the chat template, the processor, or both put it there."""
    from tokenizers.processors import TemplateProcessing

    model = tiny_vlm()
    tokenizer = model.decoder.tokenizer
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded.add_tokens([IMAGE_MARK], special_tokens=True)
    own = LitVLMProcessor(
        loaded, processor.slots, processor.hidden_size, processor.vocab_size, processor.transform, 512,
        chat_template=as_jinja(ChatML(), "<|im_end|>", "<s>"),
    )  # fmt: skip
    spec = spec_of(model)
    messages = CONVERSATIONS[2]
    expected, _ = encode_pieces(ChatML().prompt(messages, "<|im_end|>"), spec)
    assert expected[0] == start
    text = own.apply_chat_template(chat(messages), add_generation_prompt=True)
    assert text.startswith("<s>")
    for add in (True, False):
        assert own(text=text, add_special_tokens=add)["input_ids"][0] == expected
    assert own.apply_chat_template(chat(messages), tokenize=True, add_generation_prompt=True)[0] == expected
    assert own(text="a")["input_ids"][0][0] == start
    assert own(text="a", add_special_tokens=False)["input_ids"][0][0] != start
