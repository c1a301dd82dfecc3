"""HFDecoder: what of published files it insists on."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

from lit_vlm.core.batch import Grid, PixelSpec
from lit_vlm.core.tokenizers import byte_tokenizer
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.decoders import DivideAndConquer, HFDecoder, Lora
from lit_vlm.model.build import build
from tests.tiny import CLIP, LLAMA, tiny_slots


def written(folder: Path, tied: bool = False) -> Path:
    """A tiny Llama as transformers writes it; its weight file."""
    torch.manual_seed(0)
    settings = LLAMA | {"vocab_size": 300, "tie_word_embeddings": tied}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).save_pretrained(folder)
    return folder / "model.safetensors"


FORMS = {
    "plain": HFDecoder,
    "lora": partial(HFDecoder, lora=Lora(rank=2)),
    "split": DivideAndConquer,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("key", ["lm_head.weight", "model.layers.1.self_attn.q_proj.weight", "model.norm.weight"])
def test_a_weight_that_the_files_lack_is_named_and_never_random(form: str, key: str, tmp_path: Path) -> None:
    file = written(tmp_path)
    state = load_file(file)
    lost = state.pop(key)
    save_file(state, file, metadata={"format": "pt"})
    slots = tiny_slots(decoder=partial(FORMS[form], name=str(tmp_path), tokenizer="bytes"))
    with pytest.raises(ValueError, match=rf"decoder.name {tmp_path} has no weights for {key} \(missing\)"):
        build(slots)
    save_file(state | {key: torch.cat([lost, lost])}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"has no weights for {key} \(\({2 * len(lost)}.*\) instead of "):
        build(slots)


@pytest.mark.parametrize("form", FORMS)
def test_a_tied_output_layer_need_not_be_in_the_files(form: str, tmp_path: Path) -> None:
    file = written(tmp_path, tied=True)
    assert "lm_head.weight" not in load_file(file)
    decoder = build(tiny_slots(decoder=partial(FORMS[form], name=str(tmp_path), tokenizer="bytes"))).decoder
    words = load_file(file)["model.embed_tokens.weight"]
    assert torch.equal(decoder.logits(torch.eye(64)), words.T)


@pytest.mark.parametrize("form", FORMS)
def test_weights_that_no_part_of_the_decoder_takes_are_refused(form: str, tmp_path: Path) -> None:
    written(tmp_path)
    slots = tiny_slots(decoder=partial(FORMS[form], name=str(tmp_path), tokenizer="bytes"))
    plain = HFDecoder(name=str(tmp_path), tokenizer="bytes").state_dict()
    fresh = ("encoder", "projector", "embedder")
    build(slots, {"decoder": plain}, fresh)
    with pytest.raises(ValueError, match=r"slot 'decoder' \(.*\): not of this part: lm.model.surprise"):
        build(slots, {"decoder": plain | {"lm.model.surprise": torch.zeros(1)}}, fresh)


def test_answers_end_where_the_model_s_own_generation_config_says(tmp_path: Path) -> None:
    written(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=[2, 5]).save_pretrained(tmp_path)
    decoder = HFDecoder(str(tmp_path))
    assert decoder.end_ids == {2, 5}
    spec = InputSpec(
        decoder.tokenizer, PixelSpec(1, 1, (0.5, 0.5, 0.5)), Grid, lambda grid: grid, end_ids=decoder.end_ids
    )
    assert spec.stop_ids == {2, 5, decoder.tokenizer.eos_token_id}
    assert HFDecoder(str(tmp_path), tokenizer="bytes").end_ids == frozenset()  # ids of another vocabulary
    (tmp_path / "generation_config.json").unlink()
    assert HFDecoder(str(tmp_path)).end_ids == frozenset()
    assert HFDecoder(config=LLAMA, tokenizer="bytes").end_ids == frozenset()


TEXT = {key: value for key, value in LLAMA.items() if key != "model_type"} | {"vocab_size": 300, "head_dim": 16}
SIGHT = {key: value for key, value in CLIP.items() if key != "model_type"}
WRAPPERS: dict[str, dict[str, Any]] = {
    "fuyu": {"text_config": {**TEXT, "model_type": "persimmon"}, "patch_size": 4},
    "gemma3": {"text_config": TEXT, "vision_config": SIGHT},
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP},
}


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_the_text_model_comes_out_of_the_files_of_a_wrapper(model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **WRAPPERS[model_type])
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path)
    decoder = HFDecoder(str(tmp_path), tokenizer="bytes", attention="eager")
    decoder.load_state_dict(decoder.pretrained_state() or {})
    ids = torch.arange(9)[None]
    with torch.no_grad():
        hidden = decoder.eval()(decoder.embed(ids), ids).hidden
        torch.testing.assert_close(decoder.logits(hidden), whole(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
