"""An exported model in the hands of transformers: answers, losses, gradients, adapters, types, copies."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    DynamicCache,
    Trainer,
    TrainingArguments,
    pipeline,
)

from lit_vlm.data.records import Image as Picture
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sample.collate import collate
from lit_vlm.hf.model import LitVLMForConditionalGeneration
from lit_vlm.hf.processor import LitVLMProcessor
from tests.exports import exported, read

RECIPES = ("llava15", "hovle", "eve_v2", "ola_vlm")
"""Splice, an embedder with a cache of its own, a decoder that treats image tokens differently, task tokens."""


def picture(seed: int, size: tuple[int, int] = (40, 30)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    return Image.fromarray(torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8).numpy())


def ask(*content: Any) -> list[dict[str, Any]]:
    parts = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": parts}]


CHATS = [
    ask(picture(0), "What is this?"),
    ask("Compare ", picture(1, (20, 50)), " with ", picture(2), ", in a few words."),
    ask("No picture at all: what is a cone?"),
]


@pytest.fixture(scope="module", params=RECIPES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / request.param
    exported(out, request.param)
    return out


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "llava15"
    exported(out, "llava15")
    return out


def load(folder: Path, **arguments: Any) -> tuple[LitVLMForConditionalGeneration, LitVLMProcessor]:
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True, **arguments)
    return model, AutoProcessor.from_pretrained(folder, trust_remote_code=True)


def prepared(processor: LitVLMProcessor, chats: Any = CHATS, **arguments: Any) -> Any:
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt",
        processor_kwargs=arguments,
    )  # fmt: skip


def test_a_cache_changes_no_answer_and_neither_does_company(folder: Path) -> None:
    model, processor = load(folder)
    inputs = prepared(processor)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs, **settings)[:, inputs["input_ids"].shape[1] :]
    without = model.generate(**inputs, use_cache=False, **settings)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(together, without)
    for row, chat in enumerate(CHATS):
        alone = prepared(processor, [chat])
        found = model.generate(**alone, **settings)[:, alone["input_ids"].shape[1] :]
        assert torch.equal(found[0], together[row])


def test_beams_keep_the_pictures_of_their_row(folder: Path) -> None:
    model, processor = load(folder)
    inputs = prepared(processor)
    settings = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    start = inputs["input_ids"].shape[1]
    found = model.generate(**inputs, **settings)[:, start:]
    assert torch.equal(found, model.generate(**inputs, use_cache=False, **settings)[:, start:])


def test_the_side_of_the_padding_changes_nothing(folder: Path) -> None:
    model, processor = load(folder)
    left, right = (prepared(processor, padding_side=side) for side in ("left", "right"))
    assert not torch.equal(left["attention_mask"], right["attention_mask"])
    with torch.no_grad():
        logits = [model(**inputs).logits[inputs["attention_mask"].bool()] for inputs in (left, right)]
        cached = model(**left, use_cache=True).logits[left["attention_mask"].bool()]
    assert torch.equal(*logits)
    torch.testing.assert_close(cached, logits[0], atol=1e-5, rtol=1e-5)


def test_loss_and_gradients_are_the_kits(folder: Path) -> None:
    module, _, written = read(folder.name)
    model, processor = load(folder)
    names = {id(p): name for name, p in module.vlm.named_parameters()}
    sample = written.sample_encoder(module.input_spec)(
        Record(
            "a", "a", (Message("user", (Picture(data=_png()), Text("What?"))), Message("assistant", (Text("A cone."),)))
        ),
        Path("/"),
    )
    batch = collate([sample])
    losses = module.vlm.train()(batch, {"next_token": 1.0})
    loss = losses["next_token"] / len(batch.targets)
    loss.backward()
    ids = torch.tensor([sample.ids])
    for start, grid in zip(sample.image_starts, sample.grids, strict=True):
        ids[0, start : start + grid.num_tokens] = processor.image_token_id
    height, width = sample.images[0].shape[1:]
    own = model.train()(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=sample.images[0][None, None],
        image_sizes=torch.tensor([[[height, width]]]),
        labels=torch.tensor([sample.labels]),
    )
    own.loss.backward()
    torch.testing.assert_close(own.loss, loss)
    found = dict(model.inner.named_parameters())
    for parameter in module.vlm.parameters():
        name = names[id(parameter)]
        if name.startswith("heads.") or parameter.grad is None:
            continue
        torch.testing.assert_close(found[name].grad, parameter.grad, atol=1e-6, rtol=1e-4)


def _png() -> bytes:
    import io

    target = io.BytesIO()
    picture(5).save(target, "png")
    return target.getvalue()


def test_recomputed_blocks_give_the_same_gradients(folder: Path) -> None:
    model, processor = load(folder)
    inputs = prepared(processor)
    found = []
    for recompute in (False, True, False):
        model.gradient_checkpointing_enable() if recompute else model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing == recompute
        model.train().zero_grad()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for other in found[1:]:
        assert found[0].keys() == other.keys()
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient)


def test_image_tokens_carry_no_loss(llava: Path) -> None:
    model, processor = load(llava)
    inputs = prepared(processor, CHATS[:1])
    labels = inputs["input_ids"].clone()
    whole = model(**inputs, labels=labels).loss
    labels[inputs["input_ids"] == processor.image_token_id] = -100
    assert torch.equal(model(**inputs, labels=labels).loss, whole)
    items = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=2 * items).loss, whole / 2)
    given = inputs["input_ids"].clone()  # as collators that know nothing of images count them
    counted = model(**inputs, labels=given, num_items_in_batch=given[:, 1:].numel()).loss
    torch.testing.assert_close(counted, whole)


def test_hidden_states_and_the_last_logits(llava: Path) -> None:
    model, processor = load(llava)
    inputs = prepared(processor)
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        last = model(**inputs, logits_to_keep=2)
        picked = model(**inputs, logits_to_keep=torch.tensor([3, -1]))
    assert len(whole.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(model.get_output_embeddings()(whole.hidden_states[-1]), whole.logits)
    torch.testing.assert_close(last.logits, whole.logits[:, -2:])
    torch.testing.assert_close(picked.logits, whole.logits[:, [3, -1]])


def test_adapters_of_peft_train_and_nothing_else(llava: Path) -> None:
    model, processor = load(llava)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*decoder.*\.(q_proj|v_proj)"))
    inputs = prepared(processor)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(3):
        loss = adapted(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all("lora_" in name for name, p in adapted.named_parameters() if p.requires_grad)
    assert adapted.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == len(CHATS)


@pytest.mark.parametrize("recompute", [False, True])
def test_transformers_own_trainer_trains_it(llava: Path, recompute: bool, tmp_path: Path) -> None:
    model, processor = load(llava)
    rows = [prepared(processor, [chat]) for chat in CHATS[:2]]
    for row in rows:
        row["labels"] = row["input_ids"].clone()

    def first(batch: list[Any]) -> Any:
        return batch[0]

    settings = TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=1, learning_rate=1e-2, gradient_checkpointing=recompute,
        report_to="none", use_cpu=True, logging_steps=1, save_strategy="no", remove_unused_columns=False,
        dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    with torch.no_grad():
        expected = [float(model.train()(**row).loss) for row in rows]
    trainer = Trainer(model, settings, data_collator=first, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert min(abs(losses[0] - one) for one in expected) < 1e-4
    assert losses[-1] < losses[0] - 0.1
    assert bool(model.inner.decoder.recompute) is recompute


def test_a_copy_of_a_copy_is_the_same(folder: Path, tmp_path: Path) -> None:
    model, processor = load(folder)
    model.save_pretrained(tmp_path / "again")
    processor.save_pretrained(tmp_path / "again")
    twin, other = load(tmp_path / "again")
    inputs, same = prepared(processor), prepared(other)
    assert all(torch.equal(inputs[name], same[name]) for name in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, twin(**same).logits)
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names
    assert "modeling_lit_vlm.py" in names


def test_half_precision_rounds_weights_and_no_tables(folder: Path) -> None:
    full, processor = load(folder)
    half, _ = load(folder, dtype=torch.bfloat16)
    cast = load(folder)[0].to(torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    tables, saved = dict(full.named_buffers()), full.state_dict().keys()
    for model in (half, cast):
        for name, buffer in model.named_buffers():
            if name not in saved:
                assert torch.equal(buffer, tables[name]), name
    inputs = prepared(processor)
    with torch.no_grad():
        logits = [model(**inputs).logits.float() for model in (full, half, cast)]
    assert torch.equal(logits[1], logits[2])
    assert 0 < float((logits[1] - logits[0]).abs().max()) < 0.2


def test_weights_of_a_configuration_alone_are_drawn(llava: Path) -> None:
    config = load(llava)[0].config
    model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    assert not any(p.is_meta for p in model.parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_the_pipeline_answers_a_chat(folder: Path) -> None:
    model, processor = load(folder)
    asker = pipeline("image-text-to-text", model=str(folder), trust_remote_code=True)
    (said,) = asker(text=CHATS[0], max_new_tokens=4, return_full_text=False)
    inputs = prepared(processor, [CHATS[0]])
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said["generated_text"] == processor.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"pixel_values": None}, "one of them is missing"),
        ({"pixel_values": None, "image_sizes": None}, "row 0 has 16 image tokens, and its 0 images make 0"),
        ({"input_ids": None}, "takes input_ids, not inputs_embeds"),
        ({"output_attentions": True}, "do not give out attention weights"),
        ({"position_ids": "restarts"}, "packed rows train in the kit"),
        ({"attention_mask": torch.ones(3, 5)}, r"must be \[b, s\] both, without a cache; found .* and \[3, 5\]"),
        ({"input_ids": torch.ones(5, dtype=torch.long), "attention_mask": None}, r"must be \[b, s\] both.*found \[5\]"),
        ({"past_key_values": DynamicCache()}, "past_key_values is a DynamicCache: a model of lit-vlm makes its own"),
        ({"pixel_values": "float"}, "must be uint8"),
        ({"pixel_values": "flat"}, r"must be \[b, n, 3, h, w\].*found \[3, 3, 28, 28\]"),
    ],
)
def test_wrong_inputs_are_named(llava: Path, changes: dict[str, Any], match: str) -> None:
    model, processor = load(llava)
    inputs = dict(prepared(processor))
    made = {
        "restarts": torch.arange(inputs["input_ids"].shape[1]).remainder(9).expand_as(inputs["input_ids"]),
        "float": inputs["pixel_values"].float(),
        "flat": inputs["pixel_values"][:, 0],
    }
    inputs |= {name: made[value] if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=match):
        model(**inputs)


def test_a_cache_cannot_be_continued_with_pictures(llava: Path) -> None:
    model, processor = load(llava)
    inputs = prepared(processor, CHATS[:1])
    model.requires_grad_(False)
    cache = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"]] * 2, dim=1)
    with pytest.raises(ValueError, match="cannot be continued with images"):
        model(**{**inputs, "attention_mask": mask}, past_key_values=cache)
    with pytest.raises(ValueError, match=r"attention_mask has \d+ columns"):
        model(input_ids=torch.tensor([[5]]), attention_mask=torch.tensor([[1]]), past_key_values=cache)
    twin = copy.deepcopy(cache)
    assert twin._vlm is cache._vlm  # a prompt's cache is copied to go on from it twice, the model is not
    one = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
    logits = [
        model(input_ids=torch.tensor([[65]]), attention_mask=one, past_key_values=past).logits for past in (cache, twin)
    ]
    assert torch.equal(*logits)
    with pytest.raises(NotImplementedError, match="takes tokens back"):
        cache.crop(1)
    with pytest.raises(NotImplementedError, match="new_tokens"):
        model.resize_token_embeddings(300)
