"""A case for each class of each slot: the tiny models that the contract tests run on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lit_vlm import decoders, embedders, encoders, projectors
from lit_vlm.core.batch import VisualTokens
from lit_vlm.decoders import DivideAndConquer, HFDecoder, Lora
from lit_vlm.embedders import Holistic, Splice, SpliceTiles
from lit_vlm.encoders import (
    S2,
    CLIPEmbedding,
    ConvPatches,
    DepthAnything,
    DINOv3ConvNeXt,
    Ensemble,
    EvePatchEmbedding,
    EveV2PatchEmbedding,
    HFEncoder,
    LinearPatches,
    MoonViT,
    NaFlexEncoder,
    OneFormerSwin,
    QwenEncoder,
    TimmEncoder,
)
from lit_vlm.heads import (
    EmbeddingDistillation,
    FeatureDistillation,
    Head,
    HolisticDistillation,
    PatchAlignment,
    WordDistillation,
)
from lit_vlm.projectors import (
    MLP,
    Downsample,
    Downsample3x3,
    DownsampleLinear,
    Identity,
    Linear,
    PatchMerge,
    PerEncoder,
    Projector,
    QwenMerger,
    Resampler,
    Transformer,
)
from lit_vlm.teachers import HFVision
from lit_vlm.testing import Case, with_adapters
from tests.encoders.test_teachers import DINO, SWIN, VIT
from tests.tiny import CLIP, LLAMA, tiny_decoder

Size = tuple[int, int]
MOONVIT = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 7,
    "pos_emb_height": 4,
    "pos_emb_width": 4,
}
NAFLEX = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 7,
    "num_patches": 16,
}
CONVNEXT = {"depths": [1, 1], "hidden_sizes": [8, 16], "layer_scale_init_value": 0.5}
QWEN = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 7,
}
QWEN2_5 = QWEN | {"model_type": "qwen2_5_vl_vision", "window_size": 14, "fullatt_block_indexes": [1]}
QWEN3 = QWEN | {"model_type": "qwen3_vl_vision", "num_position_embeddings": 9}
CLIP_ENCODER = partial(HFEncoder, config=CLIP)
SWIN_ENCODER = partial(OneFormerSwin, None, SWIN | {"drop_path_rate": 0.0}, 64, 72)
PLAIN = partial(LinearPatches, width=32, patch=7, row_end=False)
ANY_SIZE = partial(LinearPatches, width=64, patch=7)
TEACHER = partial(HFVision, None, CLIP)
LAYERS = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 128}
SIZES: list[Size] = [(28, 28), (14, 28)]
TILES: list[Size] = [(28, 28), (56, 28)]


def encoder(factory: Callable[[], Any], sizes: list[Size], projector: Any = MLP) -> Case:
    """A case with this encoder in place of the tiny LLaVA's."""
    return Case({"encoder": factory, "projector": projector}, sizes)


def projector(factory: Callable[[int, int], Projector], sizes: list[Size] = SIZES) -> Case:
    """A case with this projector, behind an encoder of patches, with pictures of two sizes."""
    return Case({"encoder": PLAIN, "projector": factory}, sizes)


def head(factory: Callable[[int, int], Head], **slots: Any) -> Case:
    """A case with this head beside the next-token loss."""
    return Case({"heads": {"own": factory}} | slots, [(28, 28)] * 2, {"next_token": 1.0, "own": 0.5})


class Tangled(Projector):
    """A projector with a module, a parameter and a buffer under two names each, and an unsaved random buffer."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__(in_width, out_width)
        self.first = nn.Linear(in_width, out_width)
        self.hidden = nn.Linear(out_width, out_width)
        self.again = self.hidden
        self.last = nn.Linear(out_width, out_width)
        self.last.weight = self.hidden.weight
        self.register_buffer("scale", torch.rand(out_width))
        self.norm = nn.Module()
        self.norm.register_buffer("scale", self.scale)
        self.register_buffer("noise", torch.rand(out_width), persistent=False)

    def forward(self, tokens: VisualTokens) -> VisualTokens:
        """`[t, in_width]` → `[t, out_width]`."""
        x = self.hidden(self.first(tokens.features)) * self.scale
        x = self.last(self.again(x)) * self.norm.get_buffer("scale")
        return VisualTokens(x * self.noise, tokens.grids)


HOLISTIC = {"encoder": partial(ConvPatches, 32, 28, 7), "projector": PatchMerge}
CASES: dict[str, Case] = {
    "S2": encoder(partial(S2, CLIP_ENCODER), [(56, 56)]),
    "CLIPEmbedding": encoder(partial(CLIPEmbedding, None, VIT), [(28, 28)]),
    "ConvPatches": encoder(partial(ConvPatches, 32, 28, 7), TILES),
    "DINOv3ConvNeXt": encoder(partial(DINOv3ConvNeXt, None, CONVNEXT, 0), [(16, 16), (8, 16)]),
    "DepthAnything": encoder(partial(DepthAnything, None, DINO, 28), TILES),
    "Ensemble": encoder(partial(Ensemble, [CLIP_ENCODER, partial(CLIPEmbedding, None, VIT), SWIN_ENCODER]), [(28, 28)]),
    "Ensemble/any size": encoder(partial(Ensemble, [PLAIN, CLIP_ENCODER]), SIZES),
    "EvePatchEmbedding": encoder(partial(EvePatchEmbedding, 16, 7, 2), SIZES),
    "EveV2PatchEmbedding": encoder(partial(EveV2PatchEmbedding, 64, 8, 7), SIZES, Identity),
    "HFEncoder": encoder(CLIP_ENCODER, TILES),
    "HFEncoder/cls": encoder(partial(HFEncoder, config=CLIP, cls=True), [(28, 28)]),
    "HFEncoder/layers": encoder(partial(HFEncoder, config=CLIP, layer=[-2, -1]), TILES),
    "LinearPatches": encoder(ANY_SIZE, SIZES, Identity),
    "MoonViT": encoder(partial(MoonViT, None, MOONVIT), SIZES),
    "NaFlexEncoder": encoder(partial(NaFlexEncoder, None, NAFLEX), SIZES),
    "OneFormerSwin": encoder(SWIN_ENCODER, [(64, 64)]),
    "QwenEncoder": encoder(partial(QwenEncoder, None, QWEN3), SIZES),
    "QwenEncoder/windows": encoder(partial(QwenEncoder, None, QWEN2_5), SIZES, QwenMerger),
    "TimmEncoder": encoder(partial(TimmEncoder, "test_convnext", None, image_size=64), [(64, 64), (128, 64)]),
    "TimmEncoder/transformer": encoder(partial(TimmEncoder, "test_vit", None), [(160, 160)]),
    "TimmEncoder/levels": encoder(partial(TimmEncoder, "test_vit", None, [1, 3]), [(160, 160)]),
    "Identity": Case({"encoder": ANY_SIZE, "projector": Identity}, SIZES),
    "Linear": projector(Linear),
    "MLP": projector(partial(MLP, depth=3)),
    "Downsample": projector(partial(Downsample, token_order="col")),
    "DownsampleLinear": projector(DownsampleLinear),
    "Downsample3x3": projector(Downsample3x3),
    "PatchMerge": projector(PatchMerge),
    "PerEncoder": encoder(
        partial(Ensemble, [CLIP_ENCODER, partial(CLIPEmbedding, None, VIT)], "tokens", 2),
        [(28, 28)],
        partial(PerEncoder, widths=[32, 24]),
    ),
    "QwenMerger": projector(QwenMerger),
    "QwenMerger/RMSNorm": projector(partial(QwenMerger, model_type="qwen2_5_vl_vision")),
    "Resampler": projector(partial(Resampler, num_queries=3, head_dim=16)),
    "Transformer": projector(partial(Transformer, depth=2, head_dim=16)),
    "Tangled": projector(Tangled),
    "Splice": Case({"embedder": partial(Splice, task_tokens={"a": 2, "b": 1}, pooled_from={"a": 4})}, [(28, 28)] * 2),
    "Splice/row end": Case({"encoder": PLAIN, "embedder": partial(Splice, row_end="<|im_end|>")}, SIZES),
    "Splice/row end and tasks": Case(
        {"encoder": PLAIN, "embedder": partial(Splice, row_end=2, task_tokens={"a": 2})}, [(28, 28), (14, 28)]
    ),
    "SpliceTiles": Case({"embedder": SpliceTiles}, [*TILES, (84, 28)]),
    "Holistic": Case(HOLISTIC | {"embedder": partial(Holistic, **LAYERS)}, TILES),
    "Holistic/merge": Case(
        HOLISTIC | {"projector": Linear, "embedder": partial(Holistic, merge=2, recompute=True, **LAYERS)}, TILES
    ),
    "AbsentDecoder": Case(
        HOLISTIC | {"embedder": partial(Holistic, recompute="offload", **LAYERS), "heads": {"own": WordDistillation}},
        TILES,
        {"own": 1.0},
        leave_out=True,
        only={"embedder": "layers"},
    ),
    "HFDecoder": Case({"decoder": tiny_decoder(tie_word_embeddings=True)}),
    "HFDecoder/whole images": Case(
        {"decoder": partial(HFDecoder, config=LLAMA, tokenizer="bytes", image_attention="bidirectional")}
    ),
    "DivideAndConquer": Case(
        {"decoder": partial(DivideAndConquer, config=LLAMA, tokenizer="bytes", recompute=True)}, [(28, 28)]
    ),
    "DivideAndConquer/vision": Case(
        {"decoder": partial(DivideAndConquer, config=LLAMA, tokenizer="bytes", recompute="offload")},
        [(28, 28)],
        only={"decoder": "vision"},
    ),
    "FeatureDistillation": head(partial(FeatureDistillation, teacher=TEACHER)),
    "PatchAlignment": head(partial(PatchAlignment, teacher=TEACHER, every=1, num_heads=2)),
    "HolisticDistillation": head(
        partial(HolisticDistillation, teacher=TEACHER, ratio=1), embedder=partial(Holistic, **LAYERS)
    ),
    "WordDistillation": head(WordDistillation, embedder=partial(Holistic, **LAYERS)),
    "EmbeddingDistillation": head(
        partial(EmbeddingDistillation, teacher=TEACHER, layers=[1, 3], num_targets=16, tokens="own"),
        embedder=partial(Splice, task_tokens={"own": 2}),
    ),
}

SLOT_OF = {
    name: package.__name__.rpartition(".")[2].removesuffix("s")
    for package in (encoders, projectors, embedders, decoders)
    for name in CASES
    if name.split("/")[0] in package.__all__
} | {"Tangled": "projector", "AbsentDecoder": "embedder"}
"""The slot of each member but heads, by the name of its case."""
WITHOUT_LINEAR_LAYERS = (
    "ConvPatches",
    "EveV2PatchEmbedding",
    "Identity",
    "Splice",
    "Splice/row end",
    "Splice/row end and tasks",
    "SpliceTiles",
)
ADAPTED: dict[str, Case] = {
    f"{name} with adapters": with_adapters(CASES[name], slot)
    for name, slot in SLOT_OF.items()
    if name not in WITHOUT_LINEAR_LAYERS
} | {"HFDecoder/lora": Case({"decoder": tiny_decoder(Lora(rank=2))})}
"""The cases again, with adapters on the part that they are named after."""


class Looping(LinearPatches):
    """An encoder that breaks a rule: its block runs once for each size of picture."""

    def __init__(self) -> None:
        super().__init__(width=32, patch=7, row_end=False)
        self.linear = nn.Sequential(self.linear)  # type: ignore[assignment]

    def blocks(self) -> list[nn.Module]:
        """The only layer."""
        return [self.linear]

    def _encode(self, pixels: Tensor) -> Tensor:
        patch = self.patch_grid.patch
        x = self.normalise(pixels, torch.float32).unfold(2, patch, patch).unfold(3, patch, patch)
        return self.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3)).flatten(1, 2)
