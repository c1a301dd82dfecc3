"""Mono-InternVL: published names in and out, and the forward pass as its public code computes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_vlm.checkpoints import load_published, read_slots
from lit_vlm.checkpoints.published.layout import trial_batch
from lit_vlm.checkpoints.published.mono_internvl import MonoInternVL
from lit_vlm.core.batch import Batch
from lit_vlm.data import ChatML, Tiles
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.decoders import DivideAndConquer
from lit_vlm.encoders import ConvPatches
from lit_vlm.model.build import build
from lit_vlm.model.vlm import VLM
from lit_vlm.projectors import Downsample
from tests.tiny import LLAMA, tiny_slots

HEADS, GROUPS = LLAMA["num_attention_heads"], LLAMA["num_key_value_heads"]


def parts() -> dict[str, Any]:
    return tiny_slots(
        encoder=lambda: ConvPatches(16, 28, 7),
        projector=Downsample,
        decoder=lambda: DivideAndConquer(config=LLAMA, tokenizer="bytes", split="mlp"),
    )


def model_of() -> VLM:
    torch.manual_seed(0)
    model = build(parts())
    with torch.no_grad():
        for value in (*model.parameters(), model.encoder.get_buffer("class_embedding")):
            value.add_(0.1 * torch.randn_like(value))
    return model.eval()


@pytest.fixture(name="folder")
def fixture_folder(tmp_path: Path) -> Path:
    MonoInternVL().export(model_of(), tmp_path / "out", SampleFormat(ChatML(), Tiles(max_tiles=3), 512, True))
    return tmp_path / "out"


def test_what_is_exported_is_read_back(folder: Path) -> None:
    model = model_of()
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_dynamic_patch"], config["use_thumbnail"]) == (3, True)
    again = build(parts(), read_slots(f"mono_internvl:{folder}"))
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    with pytest.raises(ValueError, match=r"is no key of the family hovle|neither config.json nor"):
        load_published("hovle", folder)


def test_keys_are_those_of_the_public_code(folder: Path) -> None:
    block = [f"{name}.weight" for name in (
        "attention.wqkv", "attention.wo", "attention_norm", "ffn_norm",
        *(f"feed_forward{kind}.{one}" for kind in ("", "_ve") for one in ("w1", "w2", "w3")),
    )]  # fmt: skip
    expected = {
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.position_embedding",
        *(f"vision_model.embeddings.patch_embedding.{kind}" for kind in ("weight", "bias")),
        *(f"mlp1.{layer}.{kind}" for layer in (0, 1, 3) for kind in ("weight", "bias")),
        *(f"language_model.model.layers.{i}.{name}" for i in range(LLAMA["num_hidden_layers"]) for name in block),
        *(f"language_model.{name}.weight" for name in ("model.tok_embeddings", "model.norm", "output")),
    }
    assert load_file(folder / "model.safetensors").keys() == expected


class Reference:
    """The forward pass as the public code has it, on its own names: both experts of every token are computed."""

    def __init__(self, folder: Path) -> None:
        self.state = load_file(folder / "model.safetensors")
        self.config = json.loads((folder / "config.json").read_text())

    def __getitem__(self, name: str) -> Tensor:
        return self.state[f"{name}.weight"]

    def image(self, pixels: Tensor) -> Tensor:
        """Normalised pixels `[n, 3, h, w]` of tiles → `[n, t, d]`."""
        at = "vision_model.embeddings."
        patches = F.conv2d(pixels, self[f"{at}patch_embedding"], self.state[f"{at}patch_embedding.bias"], stride=7)
        n, c, rows, cols = patches.shape
        x = patches.flatten(2).transpose(1, 2) + self.state[f"{at}position_embedding"][:, 1:]
        x = x.reshape(n, rows, cols // 2, 2 * c).permute(0, 2, 1, 3)
        x = x.reshape(n, cols // 2, rows // 2, 4 * c).permute(0, 2, 1, 3).reshape(n, -1, 4 * c)
        x = F.layer_norm(x, (4 * c,), self["mlp1.0"], self.state["mlp1.0.bias"])
        x = F.gelu(F.linear(x, self["mlp1.1"], self.state["mlp1.1.bias"]))
        return F.linear(x, self["mlp1.3"], self.state["mlp1.3.bias"])

    def logits(self, ids: Tensor, visual: Tensor, image: Tensor) -> Tensor:
        """Ids `[s]` and a mask of image positions `[s]` → `[s, v]`."""
        x = F.embedding(ids, self["language_model.model.tok_embeddings"])
        x[visual] = image
        for i in range(self.config["llm_config"]["num_hidden_layers"]):
            at = f"language_model.model.layers.{i}."
            x = x + self.attention(self.norm(x, f"{at}attention_norm"), f"{at}attention.")
            h, mask = self.norm(x, f"{at}ffn_norm"), visual[:, None].float()
            x = x + self.mlp(h, f"{at}feed_forward.") * (1 - mask) + self.mlp(h, f"{at}feed_forward_ve.") * mask
        return F.linear(self.norm(x, "language_model.model.norm"), self["language_model.output"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        eps = self.config["llm_config"]["rms_norm_eps"]
        return self[name] * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)

    def mlp(self, x: Tensor, at: str) -> Tensor:
        return F.linear(F.silu(F.linear(x, self[f"{at}w1"])) * F.linear(x, self[f"{at}w3"]), self[f"{at}w2"])

    def attention(self, x: Tensor, at: str) -> Tensor:
        queries = HEADS // GROUPS
        qkv = F.linear(x, self[f"{at}wqkv"]).view(len(x), GROUPS, queries + 2, -1)
        q, k, v = qkv[:, :, :queries].flatten(1, 2), qkv[:, :, queries], qkv[:, :, queries + 1]
        q, k = self.rotated(q), self.rotated(k)
        k, v = (one.repeat_interleave(queries, 1) for one in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        scores = scores + torch.full((len(x), len(x)), -torch.inf).triu(1)
        return F.linear(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1), self[f"{at}wo"])

    def rotated(self, x: Tensor) -> Tensor:
        size = x.shape[-1]
        angles = self.config["llm_config"]["rope_theta"] ** (-torch.arange(0, size, 2) / size)
        angles = torch.arange(len(x))[:, None] * angles
        cos, sin = (torch.cat([one, one], -1)[:, None] for one in (angles.cos(), angles.sin()))
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


@torch.no_grad()
def test_logits_are_those_of_the_public_code(folder: Path) -> None:
    model = load_published("mono_internvl", folder)
    batch: Batch = trial_batch(model)
    reference = Reference(folder)
    pixels = torch.stack([model.encoder.normalise(one, torch.float32)[0] for _, one in batch.images.groups()])
    ids = batch.input_ids[0]
    visual = torch.zeros(len(ids), dtype=torch.bool)
    visual[4 : 4 + 4] = True  # 2 × 2 tokens behind four words
    expected = reference.logits(ids, visual, reference.image(pixels)[0])
    torch.testing.assert_close(model.logits(batch)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ps_version": "v1"}, "ps_version is 'v1'; Mono-InternVL is read with 'v2' only"),
        ({"downsample_ratio": 1.0}, "downsample_ratio is 1.0"),
        ({"vision_config": None}, "vision_config is None, expected the settings"),
    ],
)
def test_settings_of_other_models_are_refused(folder: Path, change: dict[str, Any], match: str) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=match):
        load_published("mono_internvl", folder)


def test_other_models_are_not_written(tmp_path: Path) -> None:
    model = build(tiny_slots(encoder=lambda: ConvPatches(16, 28, 7), projector=Downsample))
    with pytest.raises(ValueError, match="DivideAndConquer with split mlp; this model is"):
        MonoInternVL().export(model, tmp_path / "out")


def test_a_lost_expert_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    key = "language_model.model.layers.1.feed_forward_ve.w2.weight"
    save_file({name: value for name, value in load_file(file).items() if name != key}, file)
    with pytest.raises(ValueError, match=key):
        load_published("mono_internvl", folder)
