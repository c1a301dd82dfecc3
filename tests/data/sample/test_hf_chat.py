"""Chat templates of tokenizers: ids as transformers writes them, labels by marks or by prompts."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lit_vlm.core.batch import IGNORE, Opening
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.sample.chat_template import as_jinja
from lit_vlm.data.sample.collate import collate_prompts
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.hf_chat import HFChat
from lit_vlm.data.sample.pieces import encode_pieces
from lit_vlm.data.sample.templates import VICUNA_SYSTEM, ChatML, Llama3, Phi3, Span, Template, VicunaV1
from lit_vlm.data.sample.transforms import PadSquare
from tests.conftest import FIXTURES, make_spec
from tests.data.sample.test_templates import supervised_of, text_of

MARK = re.compile(r"<[|｜/a-z_▁][^<>\s'\"{}]*>|\[/?[A-Z_]+\]")
DAY = "26 July 2024"


def say(role: str, text: str) -> Message:
    assert role in ("system", "user", "assistant", "tool")
    return Message(role, (Text(text),))  # type: ignore[arg-type]


ONE = [say("user", "What is it?"), say("assistant", "A red cube.")]
TWO = [*ONE, say("user", "And this one?"), say("assistant", " A cone, \n it seems. ")]
SYSTEM = [say("system", "Be brief."), *ONE]

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% else %}" + VICUNA_SYSTEM + "{% endif %} "
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT:"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""Thoughts, empty ones, in front of the last answer alone."""


def tokenizer(template: str, pieces: bool = False) -> Any:
    """A tokenizer that knows the marks of a template: of bytes, or of pieces with bytes where they lack a letter."""
    made = AutoTokenizer.from_pretrained(FIXTURES / "tiny_llama") if pieces else byte_tokenizer()
    if made.bos_token is None:
        made.add_special_tokens({"bos_token": "<s>"})
    known = {str(token) for token in made.added_tokens_decoder.values()}
    roles = [f"<|{role}|>" for role in ("system", "user", "assistant")]
    made.add_special_tokens(
        {"additional_special_tokens": sorted({*MARK.findall(template), *roles} - known)},
    )
    made.chat_template = template
    return made


def bound(template: str, **settings: Any) -> tuple[HFChat, Any]:
    made = tokenizer(template)
    return HFChat(**settings).for_tokenizer(made), made


CALLS = [
    say("user", "What is 2 + 3?"),
    say("assistant", "add(a=2, b=3)"),
    say("tool", "5"),
    say("assistant", "It is 5."),
]


def encoded(template: Template, messages: list[Message], made: Any) -> tuple[list[int], list[int]]:
    return encode_pieces(template.render(messages, made.eos_token or ""), make_spec(made), not template.own_start)


def expected(chat: HFChat, messages: list[Message], made: Any, marked: bool = False) -> Any:
    """What transformers writes of the same chat, on the same day."""
    if chat.date:
        made.chat_template = re.sub(r"strftime_now\([^)]*\)", repr(chat.date), chat.jinja)
    talk = [{"role": m.role, "content": [{"type": "text", "text": m.text}] if chat.parts else m.text} for m in messages]
    return made.apply_chat_template(talk, tokenize=True, return_dict=True, return_assistant_tokens_mask=marked)


def families() -> list[Path]:
    """Chat templates of published models, which the package TRL carries."""
    trl = pytest.importorskip("trl")
    return sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))


def chat_of(made: Any) -> HFChat | None:
    """The template of a tokenizer; None for one that asks with thoughts that answers do not have."""
    try:
        return HFChat().for_tokenizer(made)
    except ValueError as error:
        if "init_args.date" in str(error):
            return HFChat(date=DAY).for_tokenizer(made)
        if "asks for answer 1 behind" in str(error):
            return None
        raise


def test_turns_of_tools_are_written_as_transformers_writes_them() -> None:
    written = set()
    for file in families():
        made = tokenizer(file.read_text(encoding="utf-8"))
        if (chat := chat_of(made)) is None:
            continue
        try:
            ids, labels = encoded(chat, CALLS, made)
        except RecordError:  # answers written otherwise once more follows, or no such turns
            continue
        assert ids == expected(chat, CALLS, made)["input_ids"]
        learnt = made.decode([token for token in labels if token != IGNORE])
        assert "add" in learnt
        assert "It is 5." in learnt
        assert "2 + 3" not in learnt
        asked = chat.prompt(CALLS[:3], made.eos_token or "")
        assert text_of(asked) == chat._render([(m.role, m.text) for m in CALLS[:3]], True)
        written.add(file.stem)
    assert len(written) > 5, written


def test_prompts_say_what_answers_begin_with() -> None:
    made = byte_tokenizer()  # in which thoughts are spelled in letters, as with Qwen3 they are no special tokens
    made.chat_template = THINKS
    spec, record = make_spec(made), Record("a", "chats", tuple(ONE))
    for arguments, opening in (({}, "<think>\n\n</think>"), ({"enable_thinking": False}, "")):
        written = SampleFormat(HFChat(arguments=arguments), PadSquare(), 512, True)
        sample = written.sample_encoder(spec, prompt=True)(record, Path())
        assert sample.opening == Opening(opening, len(f"{opening}\n\n") if opening else 0)  # a token for each byte
        assert collate_prompts([sample], pad_id=0).opening == sample.opening
        assert written.sample_encoder(spec)(record, Path()).opening == Opening()


def test_turns_of_tools_stand_behind_answers_and_in_templates_that_have_them() -> None:
    chat, made = bound(CHATML)
    twice = [*CALLS[:3], say("tool", "five"), CALLS[3]]
    assert "<|im_start|>tool\nfive<|im_end|>" in made.decode(encoded(chat, twice, made)[0])
    for wrong, said in (
        ([CALLS[0], CALLS[2]], "turn 1 is of 'tool', and only assistant may come here"),
        ([CALLS[2]], "turn 0 is of 'tool', and only user may come here"),
        ([*CALLS[:3], CALLS[0]], "turn 3 is of 'user', and only assistant or tool may come here"),
    ):
        with pytest.raises(RecordError, match=said):
            chat.render(wrong, "")
    with pytest.raises(
        RecordError, match="turn 2 is of 'tool', and the template ChatML has no such turns: take HFChat"
    ):
        ChatML().render(CALLS, "")


@pytest.mark.parametrize("pieces", [False, True])
def test_templates_of_published_models_give_the_ids_and_masks_of_transformers(pieces: bool) -> None:
    written, refused, masked = set(), set(), set()
    for file in families():
        text = file.read_text(encoding="utf-8")
        made = tokenizer(text, pieces)
        chat = chat_of(made)
        if chat is None:
            refused.add(file.stem)
            continue
        marked = file.stem.endswith("_training")
        for messages in (ONE, TWO, SYSTEM):
            try:
                ids, labels = encoded(chat, messages, made)
            except RecordError:
                if messages is ONE:
                    raise
                continue
            found = expected(chat, messages, made, marked)
            assert ids == found["input_ids"], file.stem
            assert [label for label in labels if label != IGNORE] == [
                token for token, label in zip(ids, labels, strict=True) if label != IGNORE
            ]
            if marked:
                assert [int(label != IGNORE) for label in labels] == found["assistant_masks"], file.stem
                masked.add(file.stem)
            written.add(file.stem)
    assert len({name.split("_")[0] for name in written}) >= 15
    assert len(masked) >= 15
    assert not any(name.endswith("_training") for name in refused)


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize(
    ("jinja", "own"),
    [(CHATML, ChatML()), (LLAMA3, Llama3()), (PHI3, Phi3()), (VICUNA, VicunaV1())],
    ids=["ChatML", "Llama3", "Phi3", "VicunaV1"],
)
@pytest.mark.parametrize(
    "messages", [ONE, [*TWO[:3], say("assistant", "A cone.")], SYSTEM], ids=["one", "two", "system"]
)
def test_it_is_the_kits_own_template_where_that_is_the_models(
    jinja: str, own: Template, messages: list[Message], pieces: bool
) -> None:
    made = tokenizer(jinja, pieces)
    ids, labels = encoded(HFChat().for_tokenizer(made), messages, made)
    wanted, own_labels = encode_pieces(own.render(messages, made.eos_token), make_spec(made), bos=False)
    if isinstance(own, Llama3):  # it writes the token itself that its tokenizer puts in front of every text
        wanted, own_labels = [made.bos_token_id, *wanted], [IGNORE, *own_labels]
    if isinstance(own, Phi3):  # its chat template ends a conversation with the end of text, without a loss
        wanted, own_labels = [*wanted, made.eos_token_id], [*own_labels, IGNORE]
    assert (ids, labels) == (wanted, own_labels)


def test_letters_of_marks_in_contents_stay_letters_and_pictures_stay_in_place() -> None:
    chat, made = bound(CHATML)
    messages = [
        Message("user", (Image(path="a"), Text("\nIs <|im_end|> red, "), Image(path="b"), Text("\ue000?"))),
        say("assistant", "No <|im_start|>."),
    ]
    pieces = chat.render(messages, made.eos_token)
    assert text_of(pieces) == (
        "<|im_start|>user\n<image>\nIs <|im_end|> red, <image>\ue000?<|im_end|>\n"
        "<|im_start|>assistant\nNo <|im_start|>.<|im_end|>\n"
    )
    assert [piece.path for piece in pieces if isinstance(piece, Image)] == ["a", "b"]
    assert supervised_of(pieces) == ["No <|im_start|>.<|im_end|>"]
    ids, labels = encode_pieces(pieces, make_spec(made), False)
    assert ids.count(made.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(made.convert_tokens_to_ids("<|im_start|>")) == 2
    assert (ids, labels) == encode_pieces(ChatML().render(messages, ""), make_spec(made), False)


def test_loss_goes_by_parts_of_an_answer_and_its_mark_with_the_last() -> None:
    chat, _ = bound(CHATML)
    talk = [say("user", "Why?"), Message("assistant", (Text("So ", loss=False), Text("it is.")))]
    assert supervised_of(chat.render(talk, "")) == ["it is.<|im_end|>"]
    silent = [say("user", "Why?"), Message("assistant", (Text("So.", loss=False),)), *ONE]
    assert supervised_of(chat.render(silent, "")) == ["A red cube.<|im_end|>"]


def test_prompts_end_where_the_answer_begins() -> None:
    for jinja in (CHATML, LLAMA3, THINKS):
        chat, made = bound(jinja)
        whole = text_of(chat.render(ONE, made.eos_token))
        prompt = text_of(chat.prompt(ONE, made.eos_token))
        assert whole.startswith(prompt)
        assert prompt.endswith(("assistant\n", "<|end_header_id|>\n\n"))
        asked = [{"role": "user", "content": "What is it?"}]
        assert prompt == made.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)


def test_thoughts_that_earlier_answers_lose_are_refused_or_the_last_answer_alone_is_taught() -> None:
    chat, _ = bound(THINKS)
    assert supervised_of(chat.render(ONE, "")) == ["<think>\n\n</think>\n\nA red cube.<|im_end|>"]
    with pytest.raises(RecordError, match=r"writes answer 1 as '<think>.* set init_args.answers to last"):
        chat.render(TWO, "")
    dropped, begins = chat.notes()
    assert "conversations of several answers are dropped" in dropped
    assert "\ue001" not in dropped
    assert begins.startswith(r"answers begin with '<think>\n\n</think>\n\n', which the model learns to write")
    last, _ = bound(THINKS, answers="last", arguments={"enable_thinking": False})
    assert supervised_of(last.render(TWO, "")) == [" A cone, \n it seems. <|im_end|>"]
    assert text_of(last.prompt(TWO, "")).endswith("<think>\n\n</think>\n\n")
    assert last.closing("") == "<|im_end|>"
    assert last.notes() == []


def test_an_answer_as_the_model_wrote_it_can_be_asked_about_again() -> None:
    chat, _ = bound(THINKS)
    said = [ONE[0], say("assistant", "<think>\n\n</think>\n\nA red cube."), say("user", "Sure?")]
    plain = [*ONE, say("user", "Sure?")]
    assert text_of(chat.prompt(said, "")) == text_of(chat.prompt(plain, ""))
    assert text_of(chat.prompt(plain, "")).count("think") == 0


def test_a_day_in_a_template_must_be_given() -> None:
    jinja = "Today is {{ strftime_now('%d %b %Y') }}.\n" + CHATML
    with pytest.raises(ValueError, match=r"writes the day of writing.* set init_args.date, such as '26 July 2024'"):
        bound(jinja)
    chat, made = bound(jinja, date=DAY)
    assert text_of(chat.render(ONE, made.eos_token)).startswith("Today is 26 July 2024.\n<|im_start|>user")


@pytest.mark.parametrize(
    ("jinja", "match"),
    [
        ("{{ messages[0].content }}", "does not write messages of user, assistant once each and in order"),
        (CHATML + "{{ messages[0].content }}", "does not write messages of user, assistant once each"),
        ("{{ raise_exception('no') }}", "the chat template refuses it: no"),
        ("{% for m in messages %}", "the chat template refuses it: Unexpected end of template"),
        (CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif"), "asks for answer 1 behind '.*<think>"),
    ],
)
def test_templates_that_answers_cannot_be_found_in_are_refused(jinja: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        bound(jinja)


@pytest.mark.parametrize(
    ("jinja", "match"),
    [
        (CHATML.replace("m.content", "(m.content | upper)"), "rewrites the text of messages\\[0\\]"),
        (CHATML.replace("m.content", "m.content.split('cube')[0]"), "rewrites the text of messages\\[1\\]"),
        ("{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML, "no system"),
    ],
)
def test_a_conversation_that_is_written_otherwise_is_dropped_with_its_reason(jinja: str, match: str) -> None:
    chat, _ = bound(jinja)
    with pytest.raises(RecordError, match=match):
        chat.render(SYSTEM if "system" in match else ONE, "")


def test_a_template_that_refuses_a_system_text_is_used_without_one() -> None:
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
    made = tokenizer(refusing)
    SampleFormat(HFChat(), PadSquare(), 512, True).check_marks(make_spec(made), "refuse")
    chat = HFChat().for_tokenizer(made)
    assert text_of(chat.render(ONE, "")) == text_of(ChatML().render(ONE, ""))
    talk = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": [{"type": "text", "text": "A."}]},
    ]
    jinja = as_jinja(chat, made.eos_token, "")
    assert made.apply_chat_template(talk, chat_template=jinja, tokenize=False).endswith("assistant\nA.<|im_end|>\n")


@pytest.mark.parametrize(("closing", "behind"), [("<|im_end|>\n", ""), ("\n<|im_end|>", "\n")])
def test_the_token_that_closes_an_answer_is_found_in_what_is_taught_behind_it(closing: str, behind: str) -> None:
    marked = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "CLOSE{% endgeneration %}{% else %}{{ m.content }}CLOSE{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ).replace("CLOSE", closing)
    made = tokenizer(marked)
    assert HFChat().for_tokenizer(made).closing("") == "<|im_end|>"
    written = SampleFormat(HFChat(), PadSquare(), 512, True)
    assert written.closing_id(make_spec(made)) == made.convert_tokens_to_ids("<|im_end|>")
    with pytest.raises(RecordError, match="no_supervision"):
        written.sample_encoder(make_spec(made))(Record("a", "a", (say("user", "Why?"),)), Path())


def test_marks_decide_also_where_they_hold_one_answer_of_two() -> None:
    last_alone = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}{% generation %}"
        "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    chat, made = bound(last_alone)
    _, labels = encoded(chat, TWO, made)
    found = expected(chat, TWO, made, marked=True)
    assert [int(label != IGNORE) for label in labels] == found["assistant_masks"]
    assert supervised_of(chat.render(TWO, "")) == [" A cone, \n it seems. <|im_end|>"]


def test_white_space_in_front_of_a_template_stays() -> None:
    for front in ("\n\n", "  ", "\n  "):
        chat, made = bound(front + CHATML)
        assert encoded(chat, ONE, made)[0] == expected(chat, ONE, made)["input_ids"]


def test_a_day_that_is_written_beside_a_system_text_alone_drops_such_records() -> None:
    jinja = "{% if messages[0].role == 'system' %}Today {{ strftime_now('%Y') }}.{% endif %}" + CHATML
    chat, _ = bound(jinja)
    chat.render(ONE, "")
    with pytest.raises(RecordError, match=r"set init_args.date, such as '26 July 2024'"):
        chat.render(SYSTEM, "")
    dated, _ = bound(jinja, date="{{ 1/0 }}")
    assert text_of(dated.render(SYSTEM, "")).startswith("Today {{ 1/0 }}.")


def test_what_a_template_s_own_code_raises_drops_the_record() -> None:
    chat, _ = bound(CHATML + "{% if messages[0].content == 'Why?' %}{{ 1 / 0 }}{% endif %}")
    with pytest.raises(RecordError, match="the chat template refuses it: division by zero"):
        chat.render([say("user", "Why?"), say("assistant", "So.")], "")


def test_what_is_set_is_the_same_in_the_exported_template() -> None:
    jinja = "{{ strftime_now('%Y') }}{% if tools[0].b is none %}{{ tools[0].a }}{% endif %}\n" + CHATML
    tools = [{"a": "é", "b": None}]
    chat, made = bound(jinja, date="日🙂 {{ 1 }}", system="Be 🙂.", arguments={"tools": tools})
    talk = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A red cube."}]
    found = made.apply_chat_template(talk, chat_template=as_jinja(chat, made.eos_token, ""), tokenize=False)
    assert found == text_of(chat.render(ONE, ""))
    assert found.startswith("日🙂 {{ 1 }}é<|im_start|>system\nBe 🙂.<|im_end|>")


def test_a_tokenizer_s_template_is_found_once() -> None:
    chat, made = HFChat(), tokenizer(CHATML)
    assert chat.for_tokenizer(made) is chat.for_tokenizer(made)
    made.add_special_tokens({"additional_special_tokens": ["<|more|>"]})
    assert "<|more|>" in chat.for_tokenizer(made).closers
    made.chat_template = "!" + CHATML
    assert text_of(chat.for_tokenizer(made).render(ONE, "")).startswith("!")


def test_a_system_text_with_a_loss_keeps_it() -> None:
    chat, _ = bound(CHATML)
    taught = [Message("system", (Text("Learn me.", loss=True),)), *ONE]
    assert supervised_of(chat.render(taught, "")) == ["Learn me.", "A red cube.<|im_end|>"]


def test_marks_of_a_template_that_the_tokenizer_lacks_are_refused() -> None:
    made = byte_tokenizer()
    spec = make_spec(made)
    with pytest.raises(ValueError, match=r"writes <\|nowhere\|> as one token"):
        SampleFormat(HFChat("<|nowhere|>" + CHATML), PadSquare(), 512, True).check_marks(spec, "refuse")


def test_tokenizers_without_a_template_and_paths_are_named(tmp_path: Path) -> None:
    bare = byte_tokenizer()
    with pytest.raises(ValueError, match="has no chat template, as of a base model: give one by init_args"):
        HFChat().for_tokenizer(bare)
    with pytest.raises(ValueError, match=r"chat_template is 'own.jinja', no jinja: .*cat FILE"):
        HFChat("own.jinja")
    with pytest.raises(ValueError, match="answers is 'some'; it is 'all' or 'last'"):
        HFChat(answers="some")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no tokenizer has given it a chat template"):
        HFChat().render(ONE, "")


def test_a_format_writes_with_the_tokenizer_of_its_model(tmp_path: Path) -> None:
    made = tokenizer(LLAMA3, pieces=True)  # one that puts a token in front of every text, as the template does
    spec = make_spec(made)
    assert spec.bos_id is not None
    written = pickle.loads(pickle.dumps(SampleFormat(HFChat(), PadSquare(), 512, True)))
    written.check_marks(spec, "refuse")
    sample = written.sample_encoder(spec)(Record("a", "a", tuple(ONE)), tmp_path)
    chat = HFChat().for_tokenizer(made)
    assert sample.ids == expected(chat, ONE, made)["input_ids"]
    assert sample.ids.count(spec.bos_id) == 1
    document = Record("a", "a", (Message("document", (Text("Once."),)),))
    assert written.sample_encoder(spec)(document, tmp_path).ids[0] == spec.bos_id
    assert written.closing_id(spec) == made.convert_tokens_to_ids("<|eot_id|>")
    assert written.prompt(ONE, spec).endswith("assistant<|end_header_id|>\n\n")
    pickle.dumps(written.sample_encoder(spec))


def test_a_template_whose_marks_are_missing_names_those_that_fit() -> None:
    spec = make_spec(tokenizer(CHATML))
    with pytest.raises(ValueError, match=r"knows no such token.* goes --data.template ChatML, or auto, the chat"):
        SampleFormat(Llama3(), PadSquare(), 512, True).check_marks(spec, "refuse")


def test_answers_without_a_closing_mark_are_noted() -> None:
    chat, _ = bound("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                    "{% if add_generation_prompt %}assistant: {% endif %}")  # fmt: skip
    assert any("closes answers with no mark" in note for note in chat.notes())
    assert isinstance(chat.render(ONE, "")[0], Span)
