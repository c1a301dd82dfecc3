"""Models as GGUF files, and what llama.cpp itself makes of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from torch import nn
from transformers import LlavaConfig

from lit_vlm.core.lora import Lora
from lit_vlm.data import ChatML, SquareCrop, VicunaV1
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import HFDecoder
from lit_vlm.embedders import Splice
from lit_vlm.encoders import HFEncoder
from lit_vlm.gguf import export, files
from lit_vlm.gguf.export import Written, export_gguf
from lit_vlm.gguf.kinds import KINDS
from lit_vlm.gguf.runtime import Runtime
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import MLP, Linear
from tests.tiny import CLIP, spec_of, tiny_decoder, tiny_vlm

pytest.importorskip("xllamacpp")

# Heads of 64 numbers, as llama.cpp's models have: with narrower ones it reads what is not there.
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
TOWER = CLIP | WIDE | {"image_size": 56, "patch_size": 14}
SIGLIP = TOWER | {"model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh"}
TEXT = WIDE | {"num_key_value_heads": 1}
QWEN = TEXT | {"model_type": "qwen2", "vocab_size": 259}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
MODELS: dict[str, Callable[[], VLM]] = {
    "llama": lambda: made(),
    "tied": lambda: made(decoder=wide(tie_word_embeddings=True)),
    "llama3": lambda: made(decoder=wide(rope_parameters=LLAMA3)),
    "head_dim": lambda: made(decoder=wide(head_dim=128)),
    "qwen2": lambda: made(decoder=wide(**QWEN)),
    "mistral": lambda: made(decoder=wide(model_type="mistral", sliding_window=None)),
    "scaled": lambda: made(decoder=wide(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})),
    "linear": lambda: made(projector=Linear),
    "one layer": lambda: made(projector=partial(MLP, depth=1)),
    "earlier layer": lambda: made(encoder=partial(HFEncoder, config=SIGLIP, layer=-2)),
    "adapters": lambda: made(decoder=wide(Lora(rank=4, alpha=4.0))),
}


def wide(lora: Lora | None = None, **changes: Any) -> partial[HFDecoder]:
    return tiny_decoder(lora, **(TEXT | changes))


def made(**slots: Any) -> VLM:
    """A model whose every weight counts: in one as it is made a picture hardly moves a logit."""
    torch.manual_seed(0)
    model = tiny_vlm(**({"encoder": partial(HFEncoder, config=SIGLIP), "decoder": wide()} | slots))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embedding" in name:
                parameter.normal_(std=0.5)
            elif parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(model: VLM, out: Path, kind: str = "f32", template: Any = None) -> Written:
    return export_gguf(model, SampleFormat(template or ChatML(), SquareCrop(), 512, True), spec_of(model), out, kind)


@pytest.mark.parametrize("name", MODELS)
def test_llama_cpp_makes_of_the_files_what_the_kit_makes_of_the_model(name: str, tmp_path: Path) -> None:
    found = write(MODELS[name](), tmp_path / "out")
    assert found.difference is not None
    assert found.difference < 0.02
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"model-f32.gguf", "mmproj-model-f32.gguf"}


def test_a_weight_in_the_wrong_place_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = files.write_encoder

    def swapped(file: Path, config: LlavaConfig, state: dict[str, torch.Tensor], *rest: Any) -> None:
        key = next(key for key in state if "position_embedding" in key)
        kept(file, config, state | {key: state[key].roll(1, 0)}, *rest)

    monkeypatch.setattr(export, "write_encoder", swapped)
    with pytest.raises(ValueError, match="llama.cpp sees another picture than the kit"):
        write(made(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_class_token_of_clip_is_refused_where_llama_cpp_misplaces_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="puts CLIP's class token behind the patches") as refused:
        write(made(encoder=partial(HFEncoder, config=TOWER)), tmp_path / "out")
    assert "another picture than the kit" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_kinds_are_smaller_and_answer(tmp_path: Path) -> None:
    sizes = {}
    for kind in KINDS:
        model = made(decoder=wide(hidden_size=256, intermediate_size=512, num_attention_heads=4))
        found = write(model, tmp_path / kind, kind)
        sizes[kind] = found.decoder.stat().st_size
        assert (found.difference is None) == kind.startswith("q")
        assert found.tokens_per_s
        assert found.encoder.name == f"mmproj-model-{'f32' if kind == 'f32' else 'f16'}.gguf"
    assert sizes["f32"] > 1.9 * sizes["f16"] > 1.7 * 1.9 * sizes["q8_0"]
    assert sizes["q8_0"] > sizes["q6_k"] > sizes["q5_k_m"] > sizes["q4_k_m"]
    types = {one.name: one.tensor_type.name for one in GGUFReader(tmp_path / "q4_k_m" / "model-Q4_K_M.gguf").tensors}
    assert types["blk.0.attn_q.weight"] == "Q4_K"
    assert types["output.weight"] == "Q6_K"
    assert types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("template", [ChatML(), VicunaV1()], ids=["chatml", "vicuna"])
def test_chats_are_written_as_the_model_was_trained(template: Any, tmp_path: Path) -> None:
    model = made()
    write(model, tmp_path / "out", template=template)
    prompt = export._prompt(SampleFormat(template, SquareCrop(), 512, True), spec_of(model))
    (picture, _) = export._pictures(model)
    with Runtime(tmp_path / "out" / "model-f32.gguf", tmp_path / "out" / "mmproj-model-f32.gguf") as runtime:
        by_prompt = runtime.answer(prompt, [picture], 4, 1)
        assert runtime.chat("What is this?", [picture], 4) == by_prompt.text


def test_a_file_that_llama_cpp_does_not_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF and nothing else")
    with pytest.raises(ValueError, match="llama.cpp does not load broken.gguf"):
        Runtime(tmp_path / "broken.gguf", None)


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ({"encoder": partial(HFEncoder, config=TOWER, cls=True)}, "no class token among the visual tokens"),
        ({"embedder": partial(Splice, task_tokens={"depth": 2})}, "gguf holds no task tokens \\(depth\\)"),
        ({"projector": partial(MLP, depth=3)}, "its MLP of depth 3"),
        ({"decoder": tiny_decoder(model_type="olmo2")}, "gguf holds decoders of llama, mistral, qwen2, not olmo2"),
        (
            {"decoder": tiny_decoder(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})},
            "default, linear or llama3, not yarn",
        ),
    ],
)
def test_what_the_files_cannot_hold_is_refused_by_name(slots: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write(made(**slots), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_something_in_it_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="is not empty"):
        write(made(), tmp_path)
    with pytest.raises(ValueError, match="there is no kind 'q9' of GGUF files here, only f32, f16, q8_0"):
        write(made(), tmp_path / "out", "q9")


def test_without_llama_cpp_files_are_written_and_nothing_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "is_installed", lambda: False)
    found = write(made(), tmp_path / "out", "f16")
    assert (found.difference, found.same_text) == (None, None)
    assert found.decoder.is_file()


def test_values_beyond_fp16_are_refused_by_name(tmp_path: Path) -> None:
    model = made()
    layer = next(module for module in model.decoder.modules() if isinstance(module, nn.Linear))
    with torch.no_grad():
        layer.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.weight: values up to 1e\+06 are beyond the range of f16"):
        write(model, tmp_path / "out", "f16")
