from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published import FAMILIES, export_published, llava_written
from lit_vlm.checkpoints.published.layout import difference_of, trial_batch
from lit_vlm.core.lora import Adapters, Lora, is_adapter
from lit_vlm.data import ChatML, SquareCrop
from lit_vlm.data.records import Image as Picture
from lit_vlm.data.records import Message, Record, Text
from lit_vlm.data.sample.collate import collate, collate_prompts
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.data.sample.templates import Span
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.model.generate import generate
from lit_vlm.projectors import MLP, Linear
from tests.members import CASES
from tests.tiny import CLIP, LLAMA, batch_of, spec_of, tiny_decoder, tiny_vlm

CONFIG = {
    "vision_config": CLIP | {"projection_dim": 16},
    "text_config": LLAMA | {"vocab_size": 300},
    "image_token_index": 299,
    "image_seq_length": 16,
}


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(**CONFIG)).state_dict()


def older_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The names of the files on the hub, from before transformers 4.52."""
    renamed = {}
    for key, value in state.items():
        key = key.removeprefix("model.")
        key = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
        key = key.replace("language_model.", "language_model.model.", 1)
        renamed["language_model.lm_head.weight" if key == "lm_head.weight" else key] = value
    return renamed | {"vision_tower.vision_model.embeddings.position_ids": torch.arange(17)[None]}


def test_names_of_old_and_new_files_give_the_same_model(state) -> None:
    new, old = load_published("llava-hf", state, CONFIG), load_published("llava-hf", older_names(state), CONFIG)
    assert new.state_dict().keys() == old.state_dict().keys()
    for name, value in new.state_dict().items():
        assert torch.equal(value, old.state_dict()[name])


def test_a_key_that_fits_nowhere_or_is_missing_is_an_error(state) -> None:
    with pytest.raises(ValueError, match="'model.image_newline' is no key of the family llava-hf"):
        load_published("llava-hf", state | {"model.image_newline": torch.zeros(1)}, CONFIG)
    name = "model.multi_modal_projector.linear_2.bias"
    with pytest.raises(ValueError, match=r"slot 'projector' \(MLP\): missing: layers.2.bias"):
        load_published("llava-hf", {key: value for key, value in state.items() if key != name}, CONFIG)
    with pytest.raises(ValueError, match="family: there is no 'nothing'; there are .*llava-hf"):
        load_published("nothing", state)
    with pytest.raises(ValueError, match="pass config as well"):
        load_published("llava-hf", state)


def test_what_a_stage_trained_comes_back_from_the_exported_folder(tmp_path: Path) -> None:
    lora = Lora(rank=2, alpha=4.0)
    model = tiny_vlm(lora=Adapters(encoder=lora, projector=lora, decoder=lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.1)
    batch = batch_of(model)
    before = model.logits(batch)
    assert export_published("llava-hf", model, tmp_path / "out", WRITTEN) <= 1e-5
    again = load_published("llava-hf", tmp_path / "out")
    slots = read_slots(f"llava-hf:{tmp_path / 'out'}")
    found = {f"{slot}.{key}": value for slot, state in slots.items() for key, value in state.items()}
    assert found.keys() == again.state_dict().keys()
    assert all(torch.equal(value, found[key]) for key, value in again.state_dict().items())
    size = before.shape[-1]
    torch.testing.assert_close(again.logits(batch)[..., :size], before, atol=1e-4, rtol=1e-4)
    assert {"model.safetensors", "tokenizer.json", "processor_config.json"} <= {
        f.name for f in (tmp_path / "out").iterdir()
    }
    with pytest.raises(ValueError, match="is not empty"):
        FAMILIES["llava-hf"].export(again, tmp_path / "out")


def test_an_export_that_gives_other_logits_is_not_called_a_success(tmp_path: Path, monkeypatch) -> None:
    original = llava_written._fill

    def broken(target, *others) -> None:
        original(target, *others)
        target.lm_head.weight.data[5] += 0.1

    monkeypatch.setattr(llava_written, "_fill", broken)
    with pytest.raises(ValueError, match="logits differ by"):
        FAMILIES["llava-hf"].export(tiny_vlm(), tmp_path / "out")


def test_rounding_grows_with_the_logits_and_is_no_difference() -> None:
    logits = torch.tensor([0.1, -0.2])
    assert difference_of(logits + 2e-5, logits) == pytest.approx(2e-5, rel=1e-2)
    assert difference_of(-30 * logits.sign() + 6e-5, -30 * logits.sign()) == pytest.approx(2e-6, rel=0.1)


def test_models_of_another_form_cannot_be_exported(tmp_path: Path) -> None:
    from lit_vlm.projectors import Resampler

    with pytest.raises(ValueError, match="this model is HFEncoder, Resampler, Splice, HFDecoder"):
        FAMILIES["llava-hf"].export(tiny_vlm(projector=Resampler), tmp_path / "out")
    for name in ("QwenEncoder", "NaFlexEncoder"):
        with pytest.raises(ValueError, match=f"this model is {name}, MLP, Splice, HFDecoder"):
            FAMILIES["llava-hf"].export(tiny_vlm(encoder=CASES[name].slots["encoder"]), tmp_path / "out")


@pytest.mark.parametrize("layer", [-1, -2, [-1, -2], [1, -1]])
@pytest.mark.parametrize("cls", [False, True])
def test_every_feature_layer_and_cls_choice_survives(layer: int | list[int], cls: bool, tmp_path: Path) -> None:
    model = tiny_vlm(encoder=partial(HFEncoder, config=CLIP, layer=layer, cls=cls))
    assert FAMILIES["llava-hf"].export(model, tmp_path / "out") <= 1e-5
    again, batch = load_published("llava-hf", tmp_path / "out").eval(), trial_batch(model)
    assert isinstance(again.encoder, HFEncoder)
    assert again.encoder.layers == model.encoder.layers
    with torch.no_grad():
        torch.testing.assert_close(again.logits(batch)[..., : model.decoder.vocab_size], model.logits(batch))


@pytest.mark.parametrize("family", ["vila", "ola_vlm"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"config": CLIP, "layer": [-1, -2]},
        {"config": CLIP | {"model_type": "dinov2_with_registers", "num_register_tokens": 2}},
    ],
)
def test_nor_do_the_other_systems(family: str, arguments: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_vlm(encoder=partial(HFEncoder, **arguments))
    with pytest.raises(ValueError, match="read at one layer .*out .*register tokens"):
        FAMILIES[family].export(model, tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"config": CLIP, "layer": [-1, -2], "merge": "sum"}, "does not hold the sum of several layers"),
        (
            {"config": CLIP | {"model_type": "dinov2_with_registers", "num_register_tokens": 2}},
            "with register tokens",
        ),
    ],
)
def test_what_the_class_does_not_do_with_an_encoder_is_refused(
    arguments: dict[str, Any], match: str, tmp_path: Path
) -> None:
    model = tiny_vlm(encoder=partial(HFEncoder, **arguments))
    with pytest.raises(ValueError, match=match):
        FAMILIES["llava-hf"].export(model, tmp_path / "out")


SPLICE = partial(Splice, task_tokens={"gen": 2, "depth": 1, "a": 2}, pooled_from={"depth": 4})
WRITTEN = SampleFormat(ChatML(), SquareCrop(), 512, True)


@pytest.mark.parametrize("projector", [Linear, partial(MLP, depth=1), MLP], ids=["Linear", "one layer", "two layers"])
def test_projectors_of_one_layer_and_task_tokens_are_held(projector: Any, tmp_path: Path) -> None:
    model = tiny_vlm(projector=projector, embedder=SPLICE)
    assert export_published("llava-hf", model, tmp_path / "out", WRITTEN) <= 1e-5


def test_deeper_projectors_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="this model is HFEncoder, MLP, Splice, HFDecoder, its MLP of depth 3"):
        export_published("llava-hf", tiny_vlm(projector=partial(MLP, depth=3)), tmp_path / "out", WRITTEN)


def test_a_written_single_layer_is_not_read_as_two(tmp_path: Path) -> None:
    export_published("llava-hf", tiny_vlm(projector=Linear), tmp_path / "out", WRITTEN)
    with pytest.raises(ValueError, match="projector_hidden_act 'linear': a projector with it is not read"):
        load_published("llava-hf", tmp_path / "out")


def test_task_tokens_come_behind_each_image_by_the_chat_template_alone(tmp_path: Path) -> None:
    """What knows LLaVA and nothing of the kit answers as the kit does."""
    model = tiny_vlm(embedder=SPLICE)
    export_published("llava-hf", model, tmp_path / "out", WRITTEN)
    twin = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    picture = Image.fromarray(torch.randint(0, 256, (28, 28, 3), dtype=torch.uint8).numpy())
    picture.save(tmp_path / "a.png")
    messages = (Message("user", (Picture(path="a.png"), Text("What "), Picture(path="a.png"), Text("is it?"))),)
    sample = WRITTEN.sample_encoder(spec_of(model), prompt=True)(Record("a", "a", messages), tmp_path)
    chat = [{"role": "user", "content": [
        {"type": "image", "image": picture}, {"type": "text", "text": "What "},
        {"type": "image", "image": picture}, {"type": "text", "text": "is it?"},
    ]}]  # fmt: skip
    inputs = processor.apply_chat_template(
        chat, tokenize=True, return_dict=True, add_generation_prompt=True, return_tensors="pt"
    )
    assert inputs["input_ids"].shape[1] == len(sample)
    with torch.no_grad():
        ours, theirs = model.logits(collate([sample])), twin(**inputs).logits
    torch.testing.assert_close(theirs[..., : ours.shape[-1]], ours, atol=1e-5, rtol=1e-5)
    found = twin.generate(**inputs, max_new_tokens=6, do_sample=False)[0, len(sample) :]
    assert int(found.max()) < model.decoder.vocab_size  # the new words are never written
    expected = generate(model, collate_prompts([sample]), [2], 6)[0]
    assert found.tolist()[: len(expected)] == expected
    assert expected


def test_task_tokens_fit_a_decoder_whose_output_layer_is_its_word_table(tmp_path: Path) -> None:
    model = tiny_vlm(embedder=SPLICE, decoder=tiny_decoder(tie_word_embeddings=True))
    assert export_published("llava-hf", model, tmp_path / "out", WRITTEN) <= 1e-5


class Numbered(ChatML):
    """Depends on the number of turns, so that no chat template can be found."""

    def _turns(self, system: Any, turns: Any, eos: str) -> Any:
        yield Span(f"{len(turns)} ")
        yield from super()._turns(system, turns, eos)


def test_a_template_that_jinja_cannot_write_leaves_the_chat_template_out(tmp_path: Path) -> None:
    written = SampleFormat(Numbered(), SquareCrop(), 512, True)
    with pytest.warns(UserWarning, match=r"no chat template is written: .*Numbered.*must have <task_gen_0>"):
        export_published("llava-hf", tiny_vlm(embedder=SPLICE), tmp_path / "out", written)
    assert AutoProcessor.from_pretrained(tmp_path / "out").chat_template is None


@pytest.mark.parametrize("family", ["llava-hf", "vila", "ola_vlm"])
def test_row_ends_of_words_are_refused_and_a_failed_export_leaves_nothing(family: str, tmp_path: Path) -> None:
    model = tiny_vlm(embedder=partial(Splice, row_end=5))
    with pytest.raises(ValueError, match=f"{family} puts no word behind the rows .* row_end 5: take .*--format hf"):
        export_published(family, model, tmp_path / "out", None)
    assert list(tmp_path.iterdir()) == []
