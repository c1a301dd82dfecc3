"""Templates and labels: against the reference's ids, and as properties over random conversations."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lit_vlm.core.batch import IGNORE
from lit_vlm.data.records import Content, Image, Message, RecordError, Text
from lit_vlm.data.sample.pieces import IMAGE_SLOT, encode_pieces
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.templates import VICUNA_SYSTEM, ChatML, Llama3, Phi3, Piece, Plain, Span, Template, VicunaV1
from lit_vlm.data.sources import LlavaJson, Mmc4

VILA: dict[str, Any] = json.loads((Path(__file__).parents[2] / "fixtures" / "vila_text.json").read_text())
MARK = "<image>"
EOS = "</s>"
TEMPLATES: list[Template] = [Plain(), VicunaV1(), ChatML(), Llama3(), Phi3()]


def parts_of(text: str) -> tuple[Content, ...]:
    parts: list[Content] = []
    for index, piece in enumerate(text.split(MARK)):
        parts += [Image(path="picture.png")] if index else []
        parts += [Text(piece)] if piece else []
    return tuple(parts)


def conversation(turns: Sequence[dict[str, str]]) -> list[Message]:
    return [Message("user" if t["from"] == "human" else "assistant", parts_of(t["value"])) for t in turns]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text if isinstance(piece, Span) else MARK for piece in pieces)


def supervised_of(pieces: Sequence[Piece]) -> list[str]:
    """Neighbouring supervised spans, joined."""
    runs: list[str] = []
    before = False
    for piece in pieces:
        now = isinstance(piece, Span) and piece.supervised
        if isinstance(piece, Span) and piece.supervised and piece.text:
            runs = [*runs[:-1], runs[-1] + piece.text] if before and runs else [*runs, piece.text]
        before = now
    return runs


def assert_matches(case: dict[str, Any], pieces: Sequence[Piece], spec: InputSpec) -> None:
    ids, labels = encode_pieces(pieces, spec)
    assert ids == case["input_ids"]
    expected = [IGNORE if label == IMAGE_SLOT else label for label in case["labels"]]
    # The reference labels the first id of a document; no position stands before it, so it never meets a loss.
    assert labels[1:] == expected[1:]


# ----- the reference's ids and labels -----


def without_space_piece(case: dict[str, Any], place: int, spec: InputSpec) -> dict[str, Any]:
    """The case without the lone space piece at `place`.

    A stretch of text that starts with a space became "▁" and "▁..." in the reference, whose tokenizer is the slow one.
    The fast tokenizers of transformers, which character offsets need, put no second space in front of a space.
    """
    assert spec.tokenizer.convert_ids_to_tokens(case["input_ids"][place]) == "▁"
    assert case["labels"][place] == IGNORE
    return {key: case[key][:place] + case[key][place + 1 :] for key in ("input_ids", "labels")}


@pytest.mark.parametrize("name", ["image_multiturn", "text_only"])
def test_vicuna_matches_vila(name: str, llama_spec: InputSpec) -> None:
    case = VILA[f"v1/{name}"]
    assert_matches(case, VicunaV1().render(conversation(case["normalised"]), EOS), llama_spec)


def test_vicuna_without_system_text_matches_vila_but_for_the_leading_space_piece(llama_spec: InputSpec) -> None:
    case = VILA["v1/text_only_nosys"]
    pieces = VicunaV1(system="").render(conversation(case["normalised"]), EOS)
    assert_matches(without_space_piece(case, 1, llama_spec), pieces, llama_spec)


def test_vicuna_with_a_space_after_the_image_matches_vila_but_for_one_space_piece(llama_spec: InputSpec) -> None:
    case = VILA["v1/repo_unit_test"]
    place = case["input_ids"].index(IMAGE_SLOT) + 1
    pieces = VicunaV1().render(conversation(case["normalised"]), EOS)
    assert_matches(without_space_piece(case, place, llama_spec), pieces, llama_spec)


def test_an_answer_that_holds_the_separator_is_supervised_where_the_reference_masks_the_whole_sample(
    llama_spec: InputSpec,
) -> None:
    # The reference finds answers by splitting at "ASSISTANT: ". One that holds these letters confuses its bookkeeping,
    # and the sample is lost without a word. Here labels come from spans, so the answer is supervised as any other.
    case = VILA["v1/mismatch_all_masked"]
    ids, labels = encode_pieces(VicunaV1().render(conversation(case["normalised"]), EOS), llama_spec)
    assert ids == case["input_ids"]
    assert set(case["labels"]) == {IGNORE}
    supervised = [label for label in labels if label != IGNORE]
    assert labels == [IGNORE] * (len(labels) - len(supervised)) + supervised
    assert llama_spec.tokenizer.decode(supervised) == "x ASSISTANT: y</s>"


def test_vicuna_text_matches_vila() -> None:
    case = VILA["v1/image_multiturn"]
    assert text_of(VicunaV1().render(conversation(case["conversation"]), EOS)) == VILA["prompt_string_raw"]


def test_an_image_in_place_matches_the_sentinel_masks_of_main_but_for_one_space_piece(llama_spec: InputSpec) -> None:
    case = VILA["main/sentinel_mask"]
    place = case["input_ids"].index(IMAGE_SLOT) + 1
    pieces = VicunaV1().render(conversation(VILA["v1/image_multiturn"]["conversation"]), EOS)
    assert_matches(without_space_piece(case, place, llama_spec), pieces, llama_spec)


def test_plain_matches_vila(llama_spec: InputSpec) -> None:
    case = VILA["plain/stage0"]
    assert_matches(case, Plain().render(conversation(case["conversation"]), EOS), llama_spec)


@pytest.mark.parametrize(
    ("name", "text"), [("adjacent_images", f"{MARK}{MARK}a cat{MARK}"), ("with_newlines", f"{MARK}\n{MARK}\na cat")]
)
def test_text_around_images_is_tokenised_as_in_vila(name: str, text: str, llama_spec: InputSpec) -> None:
    expected = VILA[f"tokenizer_image_token/{name}"]
    pieces: list[Piece] = [Span(part.text) if isinstance(part, Text) else part for part in parts_of(text)]
    assert encode_pieces(pieces, llama_spec)[0] == expected


@pytest.mark.parametrize("index", range(4))
def test_coyo_matches_vila(index: int, llama_spec: InputSpec) -> None:
    group = VILA["coyo/group_of_4"]
    case = {key: group[key][index] for key in ("input_ids", "labels")}
    caption = group["captions"][index].replace(MARK, "<IMAGE>")
    document = Message("document", (Image(path="picture.png"), Text(caption)))
    assert_matches(case, Plain().render([document], EOS), llama_spec)


@pytest.mark.parametrize("name", ["three_images", "eight_images_keep_first_six", "pairs_mode"])
def test_mmc4_matches_vila(name: str, llama_spec: InputSpec, tmp_path: Path) -> None:
    case = VILA[f"mmc4/{name}"]
    infos = [
        {"image_name": f"{i}.png", "matched_text_index": match} for i, match in enumerate(case["matched_text_index"])
    ]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text_list": case["sentences"], "image_info": infos}))
    # "pairs mode" is the paper-era loss: the sentence after an image, with padding tokens between sentences.
    settings: dict[str, Any] = {"loss": "after_image", "joint": "<unk>"} if case["pairs_mode"] else {}
    document = Mmc4(str(tmp_path / "a.jsonl"), max_images=6, **settings).record(0)
    template = Plain(typed_marks="tokens")  # the padding token is written as text of the document
    assert_matches(case, template.render(document.messages, EOS), llama_spec)
    order = [int(str(image.path)[:-4]) for image in document.images]
    reds = [10 + 20 * number for number in order]
    assert sorted(reds) == sorted(case["image_red_0_255"])


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
def test_a_document_is_written_the_same_by_every_template(template: Template) -> None:
    document = Message("document", (Text("one "), Image(path="a.png"), Text("two")))
    assert text_of(template.render([document], EOS)) == "one <image>two</s>"
    assert supervised_of(template.render([document], EOS)) == ["one ", "two</s>"]


def llava(turn: str, images: int, position: Any, folder: Path) -> Message:
    value = [{"from": "human", "value": turn}, {"from": "gpt", "value": "yes"}]
    entry = {"id": "a", "image": [f"{i}.png" for i in range(images)], "conversations": value}
    (folder / "chat.json").write_text(json.dumps([entry]))
    return LlavaJson(str(folder / "chat.json"), image_position=position).record(0).messages[0]


@pytest.mark.parametrize("index", range(4))
def test_images_to_the_front_match_vila(index: int, tmp_path: Path) -> None:
    cases = VILA["preprocess_multimodal"]
    turn, expected = cases["cases"][index], cases["v1.0"][index]
    message = llava(turn, turn.count(MARK), "front", tmp_path)
    written = "".join(part.text if isinstance(part, Text) else MARK for part in message.content)
    # The reference lets several marks of a turn collapse into one, and so loses images. Here none is lost.
    lost = max(0, turn.count(MARK) - 1)
    assert written == MARK * lost + expected


def test_a_turn_of_nothing_but_an_image_has_no_newline_as_in_llava(tmp_path: Path) -> None:
    # LLaVA strips the turn after the image has been moved, so the newline goes too.
    assert llava(MARK, 1, "front", tmp_path).text == ""


@pytest.mark.parametrize("turn", VILA["preprocess_multimodal"]["cases"])
def test_in_place_keeps_the_text_and_the_positions(turn: str, tmp_path: Path) -> None:
    message = llava(turn, turn.count(MARK), "in_place", tmp_path)
    assert "".join(part.text if isinstance(part, Text) else MARK for part in message.content) == turn
    paths = [part.path for part in message.content if isinstance(part, Image)]
    assert paths == [f"{i}.png" for i in range(turn.count(MARK))]


@pytest.mark.parametrize("index", range(4))
def test_spaced_images_match_vila15(index: int, tmp_path: Path) -> None:
    cases = VILA["preprocess_multimodal"]
    message = llava(cases["cases"][index], cases["v1.5"][index].count(MARK), "spaced", tmp_path)
    assert "".join(part.text if isinstance(part, Text) else MARK for part in message.content) == cases["v1.5"][index]


def test_spaced_frames_of_a_video_stand_on_lines_of_their_own(tmp_path: Path) -> None:
    message = llava(f"{MARK}\n" * 3 + "what happens?", 3, "spaced", tmp_path)
    written = "".join(part.text if isinstance(part, Text) else MARK for part in message.content)
    assert written == f"{MARK}\n {MARK}\n {MARK}\nwhat happens?"


# ----- what the other templates write -----

TURNS = [
    Message("system", (Text("Be brief."),)),
    Message("user", (Image(path="a.png"), Text("\nwhat?"))),
    Message("assistant", (Text("a cat"),)),
    Message("user", (Text("sure?"),)),
    Message("assistant", (Text("yes"),)),
]


def test_chatml_text_and_spans() -> None:
    pieces = ChatML().render(TURNS, "<|im_end|>")
    assert text_of(pieces) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nwhat?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nsure?<|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>\n"
    )
    assert supervised_of(pieces) == ["a cat<|im_end|>", "yes<|im_end|>"]


def test_llama3_text_and_spans() -> None:
    pieces = Llama3().render(TURNS, "<|eot_id|>")
    assert text_of(pieces) == (
        "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nwhat?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\na cat<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nsure?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nyes<|eot_id|>"
    )
    assert supervised_of(pieces) == ["a cat<|eot_id|>", "yes<|eot_id|>"]


def test_vicuna_spans() -> None:
    pieces = VicunaV1().render(TURNS, EOS)
    assert text_of(pieces) == "Be brief. USER: <image>\nwhat? ASSISTANT: a cat</s>USER: sure? ASSISTANT: yes</s>"
    assert supervised_of(pieces) == [" a cat</s>", " yes</s>"]


@pytest.mark.parametrize("template", [VicunaV1(), ChatML(), Llama3(), Phi3()], ids=lambda t: type(t).__name__)
def test_an_answer_without_loss_has_no_supervised_mark(template: Template) -> None:
    turns = [
        TURNS[1],
        Message("assistant", (Text("a dog", loss=False),)),
        TURNS[3],
        Message("assistant", (Text("no"),)),
    ]
    (only,) = supervised_of(template.render(turns, EOS))
    assert "no" in only
    assert "dog" not in only


@pytest.mark.parametrize("template", [VicunaV1(), ChatML(), Llama3(), Phi3()], ids=lambda t: type(t).__name__)
def test_a_question_with_loss_is_supervised(template: Template) -> None:
    turns = [Message("user", (Text("what "), Text("is it?", loss=True))), TURNS[2]]
    assert supervised_of(template.render(turns, EOS))[0] == "is it?"


def asked(*answers: Message) -> list[Message]:
    """A conversation with these answers."""
    return [turn for answer in answers for turn in (TURNS[3], answer)]


def said(*content: Content) -> Message:
    return Message("assistant", content)


BLANK = [said(), said(Text("")), said(Text(" \n")), said(Text("", loss=False)), said(Text(""), Text(" "))]
CONVERSING: list[Template] = [VicunaV1(), ChatML(), Llama3(), Phi3()]


@pytest.mark.parametrize("template", CONVERSING, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("blank", BLANK, ids=str)
def test_an_answer_that_holds_nothing_is_closed_wherever_it_stands(template: Template, blank: Message) -> None:
    for write in (template.render, template.prompt):
        for answers in ([blank, TURNS[4]], [TURNS[4], blank], [blank]):
            full = [said(Text("X")) if answer is blank else answer for answer in answers]
            assert text_of(write(asked(*answers), EOS)) == text_of(write(asked(*full), EOS)).replace("X", blank.text)
    ends = text_of(template.render(asked(said(Text("X"))), EOS)).split("X")[1]
    assert text_of(template.render(asked(blank), EOS)).endswith(f"{blank.text}{ends}")


@pytest.mark.parametrize("template", CONVERSING, ids=lambda t: type(t).__name__)
def test_an_answer_of_a_picture_alone_is_closed_and_has_no_loss(template: Template) -> None:
    pieces = template.render(asked(said(Image(path="a.png")), TURNS[4]), EOS)
    end = closed(template, "", EOS).strip()
    assert text_of(pieces).split(MARK)[1].startswith(end)
    (only,) = supervised_of(pieces)
    assert only == closed(template, "yes", EOS)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    "answer",
    [said(Text("a dog", loss=False)), said(Text(""), Text("a dog", loss=False)), said(Image(path="a.png"))],
    ids=["one text", "an empty text too", "a picture"],
)
def test_nothing_of_an_answer_without_loss_is_supervised(template: Template, answer: Message) -> None:
    pieces = template.render(asked(answer), EOS)
    assert supervised_of(pieces) == []
    assert text_of(pieces).rstrip("\n").endswith(closed(template, "", EOS).strip())


@pytest.mark.parametrize("template", CONVERSING, ids=lambda t: type(t).__name__)
def test_an_answer_may_begin_without_loss(template: Template) -> None:
    pieces = template.render(asked(said(Text("a dog? ", loss=False), Text("no"))), EOS)
    assert supervised_of(pieces) == [closed(template, "no", EOS).lstrip()]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("content", [(), (Text(""),), (Text("\n "), Text(""))], ids=str)
def test_a_document_that_holds_nothing_is_refused(template: Template, content: tuple[Content, ...]) -> None:
    with pytest.raises(RecordError, match="empty_document"):
        template.render([Message("document", content)], EOS)


@pytest.mark.parametrize("template", CONVERSING, ids=lambda t: type(t).__name__)
def test_a_question_may_hold_nothing(template: Template) -> None:
    pieces = template.render([Message("user", ()), TURNS[4]], EOS)
    assert supervised_of(pieces) == [closed(template, "yes", EOS)]
    assert text_of(pieces) == text_of(template.render([Message("user", (Text("Q"),)), TURNS[4]], EOS)).replace("Q", "")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
def test_where_nothing_is_asked_there_is_no_prompt(template: Template) -> None:
    for messages in ([], [TURNS[0]], [TURNS[4]], [TURNS[0], TURNS[4]]):
        with pytest.raises(RecordError, match="role_order"):
            template.prompt(messages, EOS)
    with pytest.raises(RecordError, match="role_order: a document stands alone"):
        template.prompt([Message("document", (Text("a"),))], EOS)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
def test_a_picture_of_the_system_text_is_not_lost(template: Template) -> None:
    system = Message("system", (Text("Look: "), Image(path="a.png")))
    pieces = template.render([system, TURNS[3], TURNS[4]], EOS)
    assert [piece.path for piece in pieces if isinstance(piece, Image)] == ["a.png"]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
def test_all_that_people_wrote_is_typed_and_nothing_else(template: Template) -> None:
    people = [Message(m.role, tuple(Text("X") if isinstance(p, Text) else p for p in m.content)) for m in TURNS]
    people = people[1:3] if isinstance(template, Plain) else people
    for pieces in (template.render(people, EOS), template.prompt(people, EOS)):
        spans = [piece for piece in pieces if isinstance(piece, Span)]
        assert all(span.typed == (span.text == "X") for span in spans)
    document = [Message("document", people[1].content)]
    assert next(span.typed for span in template.render(document, EOS) if isinstance(span, Span))
    tokens = type(template)(typed_marks="tokens")
    assert not any(span.typed for span in tokens.render(people, EOS) if isinstance(span, Span))


def test_a_mark_in_an_answer_is_a_token_only_where_the_template_says_so(bytes_spec: InputSpec) -> None:
    turns = asked(said(Text("with <|im_end|>, as here")))
    end = bytes_spec.tokenizer.convert_tokens_to_ids("<|im_end|>")
    counts = [
        encode_pieces(template.render(turns, "<|im_end|>"), bytes_spec)[1].count(end)
        for template in (ChatML(), ChatML(typed_marks="tokens"), ChatML(system="<|im_end|>"))
    ]
    assert counts == [1, 2, 1]
    ids, _ = encode_pieces(ChatML(system="<|im_end|>").render(turns, "<|im_end|>"), bytes_spec)
    assert ids.count(end) == 3


@pytest.mark.parametrize(
    ("template", "marks", "end"),
    [
        (Plain(), [], "\n"),
        (Plain(end=None), [EOS], EOS),
        (Plain(end=""), [], ""),
        (VicunaV1(), [EOS], EOS),
        (ChatML(), ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
        (Llama3(), ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], "<|eot_id|>"),
        (Phi3(), ["<|system|>", "<|end|>", "<|user|>", "<|assistant|>"], "<|end|>"),
    ],
    ids=["plain", "plain-eos", "plain-open", "vicuna", "chatml", "llama3", "phi3"],
)
def test_what_a_template_needs_of_a_tokenizer(template: Template, marks: list[str], end: str) -> None:
    assert template.marks(EOS) == marks
    assert template.closing(EOS) == end


def test_system_text_of_template_and_record() -> None:
    turns = TURNS[1:3]
    assert text_of(VicunaV1().render(turns, EOS)).startswith(f"{VICUNA_SYSTEM} USER: ")
    assert text_of(VicunaV1(system="Hi.").render(turns, EOS)).startswith("Hi. USER: ")
    assert text_of(VicunaV1(system="Hi.").render(TURNS, EOS)).startswith("Be brief. USER: ")
    assert text_of(ChatML().render(turns, EOS)).startswith("<|im_start|>user")
    assert text_of(ChatML(system="Hi.").render(turns, EOS)).startswith("<|im_start|>system\nHi.<|im_end|>\n")


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    "roles",
    [["assistant"], ["user", "user"], ["user", "assistant", "assistant"], ["user", "system"], ["user", "document"]],
    ids=" ".join,
)
def test_a_wrong_order_of_roles_is_refused(template: Template, roles: list[Any]) -> None:
    with pytest.raises(RecordError, match="role_order"):
        template.render([Message(role, (Text("a"),)) for role in roles], EOS)


def test_plain_takes_one_question_and_one_answer() -> None:
    with pytest.raises(RecordError, match="one question and one answer"):
        Plain().render(TURNS, EOS)


# ----- prompts, and properties -----


def random_text(rng: random.Random) -> str:
    words = [
        "cat",
        "rivière",
        "日本",
        "🙂",
        "\n",
        "two  spaces",
        "USER:",
        "ASSISTANT:",
        "x.",
        "1,5",
        "ﬁ",
        "e\u0301",
        "-",
    ]
    return " ".join(rng.choice(words) for _ in range(rng.randint(1, 6)))


def random_turns(rng: random.Random, template: Template) -> list[Message]:
    turns: list[Message] = []
    if not isinstance(template, Plain) and rng.random() < 0.5:
        turns.append(Message("system", (Text(random_text(rng)),)))
    for _ in range(1 if isinstance(template, Plain) else rng.randint(1, 4)):
        question: list[Content] = [Text(random_text(rng))]
        for _ in range(rng.randint(0, 2)):
            question.insert(rng.randint(0, len(question)), Image(path="a.png"))
        turns += [Message("user", tuple(question)), Message("assistant", (Text(random_text(rng)),))]
    return turns


def closed(template: Template, answer: str, eos: str) -> str:
    """What is supervised of an answer: itself and the mark that ends it."""
    if isinstance(template, Plain):
        return f"{answer}\n"
    if isinstance(template, VicunaV1):
        return f" {answer}{eos}"
    return answer + {ChatML: "<|im_end|>", Llama3: "<|eot_id|>", Phi3: "<|end|>"}[type(template)]  # type: ignore[index]


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("seed", range(25))
def test_supervised_tokens_decode_to_the_answers_and_their_end_marks(
    seed: int, template: Template, bytes_spec: InputSpec
) -> None:
    rng = random.Random(seed)
    turns = random_turns(rng, template)
    eos = bytes_spec.tokenizer.eos_token
    pieces = template.render(turns, eos)
    ids, labels = encode_pieces(pieces, bytes_spec)
    assert [token for token in ids if token != IMAGE_SLOT] == bytes_spec.tokenizer(
        text_of(pieces).replace(MARK, ""), add_special_tokens=False
    ).input_ids
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    expected = [closed(template, turn.text, eos) for turn in turns if turn.role == "assistant"]
    decoded = bytes_spec.tokenizer.decode([label for label in labels if label != IGNORE])
    assert decoded == "".join(expected)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("seed", range(10))
def test_a_prompt_is_the_text_right_before_the_answer(seed: int, template: Template, bytes_spec: InputSpec) -> None:
    rng = random.Random(seed)
    turns = random_turns(rng, template)
    whole, prompt = text_of(template.render(turns, EOS)), text_of(template.prompt(turns, EOS))
    assert whole.startswith(prompt)
    rest = whole.removeprefix(prompt)
    assert rest.rstrip("\n") == closed(template, turns[-1].text, EOS).rstrip("\n")
    assert template.prompt(turns[:-1], EOS) == template.prompt(turns, EOS)
    ids, labels = encode_pieces(template.render(turns, EOS), bytes_spec)
    asked, _ = encode_pieces(template.prompt(turns, EOS), bytes_spec)
    assert ids[: len(asked)] == asked
    assert labels[len(asked)] == ids[len(asked)]  # the first token that would be generated is the first supervised one


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: type(t).__name__)
def test_ids_of_a_prompt_begin_the_ids_of_the_conversation(template: Template, llama_spec: InputSpec) -> None:
    turns = [
        Message("user", (Image(path="a.png"), Text("\nwhat is in the picture"))),
        Message("assistant", (Text("a red cat"),)),
    ]
    ids, labels = encode_pieces(template.render(turns, EOS), llama_spec)
    asked, nothing = encode_pieces(template.prompt(turns, EOS), llama_spec)
    assert ids[: len(asked)] == asked
    assert set(nothing) == set(labels[: len(asked)]) == {IGNORE}


def test_a_token_that_spans_the_border_of_an_answer_is_supervised(llama_spec: InputSpec) -> None:
    ids, labels = encode_pieces([Span("what is i"), Span("n the picture", True)], llama_spec)
    text = llama_spec.tokenizer("what is in the picture", add_special_tokens=False, return_offsets_mapping=True)
    assert ids[1:] == text.input_ids
    expected = [token if end > 9 else IGNORE for token, (_, end) in zip(ids[1:], text.offset_mapping, strict=True)]
    assert labels[1:] == expected


def test_the_first_id_never_carries_a_loss(llama_spec: InputSpec) -> None:
    document = [Message("document", (Text("the cat"),))]
    for pieces in (Plain().render(document, EOS), VicunaV1().render(TURNS, EOS), Plain().render(TURNS[1:3], EOS)):
        assert encode_pieces(pieces, llama_spec)[1][0] == IGNORE


@pytest.mark.parametrize(
    ("template", "length", "digest"),
    [
        (Llama3(system=VICUNA_SYSTEM), 327, "52f225697495df56"),
        (Phi3(system="You are a helpful AI assistant."), 98, "898af7c463e7d872"),
    ],
    ids=["llama3", "phi3"],
)
def test_olas_prompts_are_the_published_ones_to_the_letter(template: Template, length: int, digest: str) -> None:
    turns = [Message("user", (Text("<image>\nQ"),)), Message("assistant", (Text("A"),))]
    text = "".join(piece.text for piece in template.render(turns, "") if isinstance(piece, Span)).rstrip("\n")
    assert len(text) == length
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
