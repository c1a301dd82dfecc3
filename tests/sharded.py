"""Two sharded processes beside one whole one: what `test_sharding` runs, once for all members."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from lit_vlm.core.batch import Batch, VisualTokens
from lit_vlm.data.sample.collate import collate
from lit_vlm.data.sample.encode import Sample
from lit_vlm.decoders import AbsentDecoder, DivideAndConquer, Lora
from lit_vlm.embedders import Holistic, Splice
from lit_vlm.encoders import (
    S2,
    CLIPEmbedding,
    ConvPatches,
    DepthAnything,
    Ensemble,
    EvePatchEmbedding,
    EveV2PatchEmbedding,
    HFEncoder,
    LinearPatches,
    OneFormerSwin,
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
from lit_vlm.model.build import build, build_on_meta
from lit_vlm.model.vlm import VLM
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
    Resampler,
    Transformer,
)
from lit_vlm.teachers import HFVision
from lit_vlm.training.sharding import shard
from lit_vlm.training.stage import Stage
from lit_vlm.training.step_flops import StepFlops
from tests.encoders.test_teachers import DINO, SWIN, VIT
from tests.tiny import CLIP, LLAMA, tiny_decoder, tiny_slots

Size = tuple[int, int]
CLIP_ENCODER = partial(HFEncoder, config=CLIP)
SWIN_ENCODER = partial(OneFormerSwin, None, SWIN | {"drop_path_rate": 0.0}, 64, 72)
PLAIN = partial(LinearPatches, width=32, patch=7, row_end=False)
ANY_SIZE = partial(LinearPatches, width=64, patch=7)
TEACHER = partial(HFVision, None, CLIP)
LAYERS = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_width": 128}
SIZES: list[Size] = [(28, 28), (14, 28)]
TILES: list[Size] = [(28, 28), (56, 28)]


@dataclass
class Case:
    """A tiny model.

    Attributes:
        slots: what differs from a tiny LLaVA.
        sizes: of the pictures, which are on one process only.
        losses: that are on.
        leave_out: slots that the stage does without.
        only: as in a stage.
    """

    slots: dict[str, Any] = field(default_factory=dict)
    sizes: list[Size] = field(default_factory=lambda: list(SIZES))
    losses: Mapping[str, float] = field(default_factory=lambda: {"next_token": 1.0})
    leave_out: bool = False
    only: dict[str, str | None] = field(default_factory=dict)


def encoder(factory: Callable[[], Any], sizes: list[Size], projector: Any = MLP) -> Case:
    """A case of another encoder."""
    return Case({"encoder": factory, "projector": projector}, sizes)


def projector(factory: Callable[[int, int], Projector], sizes: list[Size] = SIZES) -> Case:
    """A case of another projector, behind patches of pictures of two sizes."""
    return Case({"encoder": PLAIN, "projector": factory}, sizes)


def head(factory: Callable[[int, int], Head], **slots: Any) -> Case:
    """A case of a head, beside the next token."""
    return Case({"heads": {"own": factory}} | slots, [(28, 28)] * 2, {"next_token": 1.0, "own": 0.5})


class Tangled(Projector):
    """What goes by two names: modules, parameters and buffers; and a buffer that is drawn and saved nowhere."""

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
    "DepthAnything": encoder(partial(DepthAnything, None, DINO, 28), TILES),
    "Ensemble": encoder(partial(Ensemble, [CLIP_ENCODER, partial(CLIPEmbedding, None, VIT), SWIN_ENCODER]), [(28, 28)]),
    "Ensemble/any size": encoder(partial(Ensemble, [PLAIN, CLIP_ENCODER]), SIZES),
    "EvePatchEmbedding": encoder(partial(EvePatchEmbedding, 16, 7, 2), SIZES),
    "EveV2PatchEmbedding": encoder(partial(EveV2PatchEmbedding, 64, 8, 7), SIZES, Identity),
    "HFEncoder": encoder(CLIP_ENCODER, TILES),
    "HFEncoder/cls": encoder(partial(HFEncoder, config=CLIP, cls=True), [(28, 28)]),
    "LinearPatches": encoder(ANY_SIZE, SIZES, Identity),
    "OneFormerSwin": encoder(SWIN_ENCODER, [(64, 64)]),
    "TimmEncoder": encoder(partial(TimmEncoder, "test_convnext", None, image_size=64), [(64, 64), (128, 64)]),
    "TimmEncoder/transformer": encoder(partial(TimmEncoder, "test_vit", None), [(160, 160)]),
    "Identity": Case({"encoder": ANY_SIZE, "projector": Identity}),
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
    "Resampler": projector(partial(Resampler, num_queries=3, head_dim=16)),
    "Transformer": projector(partial(Transformer, depth=2, head_dim=16)),
    "Tangled": projector(Tangled),
    "Splice": Case({"embedder": partial(Splice, task_tokens={"a": 2, "b": 1}, pooled_from={"a": 4})}, [(28, 28)] * 2),
    "Holistic": Case(HOLISTIC | {"embedder": partial(Holistic, **LAYERS)}, TILES),
    "Holistic/merge": Case(
        HOLISTIC | {"projector": Linear, "embedder": partial(Holistic, merge=2, recompute=True, **LAYERS)}, TILES
    ),
    "AbsentDecoder": Case(
        HOLISTIC | {"embedder": partial(Holistic, **LAYERS), "heads": {"own": WordDistillation}},
        TILES,
        {"own": 1.0},
        leave_out=True,
        only={"embedder": "layers"},
    ),
    "HFDecoder": Case({"decoder": tiny_decoder(tie_word_embeddings=True)}),
    "HFDecoder/lora": Case({"decoder": tiny_decoder(Lora(rank=2))}),
    "DivideAndConquer": Case(
        {"decoder": partial(DivideAndConquer, config=LLAMA, tokenizer="bytes", recompute=True)}, [(28, 28)]
    ),
    "DivideAndConquer/vision": Case(
        {"decoder": partial(DivideAndConquer, config=LLAMA, tokenizer="bytes")},
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
for case in CASES.values():
    if "encoder" not in case.slots and case.sizes == SIZES:
        case.sizes = [(28, 28)]


def samples_for(model: VLM, sizes: list[Size]) -> tuple[list[Sample], list[Sample]]:
    """Samples with a picture of each size, and others without any; the same on every process."""
    generator = torch.Generator().manual_seed(1)

    def made(name: str, picture: Size | None, length: int) -> Sample:
        text = torch.randint(0, 200, (length,), generator=generator).tolist()
        if picture is None:
            return Sample(name, "made", text, [-100, *text[1:]])
        pixels = torch.randint(0, 256, (3, *picture), generator=generator).byte()
        grid = model.grid_map(model.encoder.patch_grid(*picture))
        ids = [text[0], *[0] * grid.num_tokens, *text[1:]]
        labels = [-100] * (2 + grid.num_tokens) + text[2:]
        return Sample(name, "made", ids, labels, [1], [grid], [pixels], _for_teachers(model, generator))

    seen = [made(f"image-{i}", size, 5 + i) for i, size in enumerate(sizes)]
    return seen, [made("text-0", None, 7), made("text-1", None, 4)]


def _for_teachers(model: VLM, generator: torch.Generator) -> dict[str, list[Tensor]]:
    teachers = {name: part.teacher for name, part in model.heads.items() if isinstance(part, Head)}
    sides = {name: teacher.pixels.size for name, teacher in teachers.items() if teacher is not None}
    return {
        name: [torch.randint(0, 256, (3, side, side), generator=generator).byte()]
        for name, side in sides.items()
        if side is not None
    }


def ready(model: VLM, case: Case) -> VLM:
    """Frozen and in train mode, as a stage makes it."""
    if case.leave_out:
        model.decoder = AbsentDecoder(model.decoder)
    rates = {name: 1e-3 for name, parts in model.slots().items() if any(list(part.parameters()) for part in parts)}
    Stage(train=dict(rates), only=case.only, losses=dict(case.losses)).freeze(model, [])
    return model.train()


def _step(model: VLM, batch: Batch, case: Case, scale: int = 1) -> dict[str, Tensor]:
    """Losses after their gradients were taken."""
    sums = model(batch, case.losses)
    total: Tensor = sum((case.losses[name] * value for name, value in sums.items()), torch.zeros(()))
    (scale * total).backward()
    return {name: value.detach() for name, value in sums.items()}


def whole(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses, model FLOPs and gradients of one process."""
    slots = tiny_slots(**case.slots)
    model = ready(build(slots), case)
    seen, text = samples_for(model, case.sizes)
    batch = collate([*seen, *text])
    losses = _step(model, batch, case) | {"flops": torch.tensor(StepFlops(model, slots, case.losses)(batch))}
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parted(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The same of two processes; pictures are on the second one only."""
    slots, first = tiny_slots(**case.slots), dist.get_rank() == 0
    torch.manual_seed(dist.get_rank())  # what a process draws for itself must not matter
    model = ready(build(slots) if first else build_on_meta(slots), case)
    shard(model, init_device_mesh("cpu", (2,)), None)
    model = ready(model, Case(losses=case.losses, only=case.only))
    seen, text = samples_for(model, case.sizes)
    batch = collate(text if first else seen)
    losses = _step(model, batch, case, scale=2)  # gradients are averaged
    losses["flops"] = torch.tensor(StepFlops(model, slots, case.losses)(batch))
    for name in sorted(losses):
        dist.all_reduce(losses[name])
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses, {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in grads.items()}


def difference(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> dict[str, float]:
    """By name, how far the second is from the first, over its size or a small part of the largest."""
    least = 1e-4 * max(float(value.norm()) for value in one.values())
    far = {
        name: float((two[name] - one[name]).norm() / max(least, float(one[name].norm())))
        for name in one.keys() & two.keys()
    }
    return far | dict.fromkeys(one.keys() ^ two.keys(), 9.0)


class Looping(LinearPatches):
    """Names a block and runs it once per size, against the rule."""

    def __init__(self) -> None:
        super().__init__(width=32, patch=7, row_end=False)
        self.linear = nn.Sequential(self.linear)  # type: ignore[assignment]

    def blocks(self) -> list[nn.Module]:
        """Its only layer."""
        return [self.linear]

    def _encode(self, pixels: Tensor) -> Tensor:
        patch = self.patch_grid.patch
        x = self.normalise(pixels, torch.float32).unfold(2, patch, patch).unfold(3, patch, patch)
        return self.linear(x.permute(0, 2, 3, 1, 4, 5).flatten(3)).flatten(1, 2)


def main(rank: int, folder: Path) -> None:
    """All cases, by one of two processes; the first leaves `results.pt`, and both `ends-RANK.pt`."""
    torch.set_num_threads(1)
    expected = {name: whole(case) for name, case in CASES.items()} if rank == 0 else {}
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    results: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        losses, grads = parted(case)
        if rank == 0:
            near = [difference(*pair) for pair in zip(expected[name], (losses, grads), strict=True)]
            results[name] = near[0] | near[1]
            torch.save(results, folder / "results.pt")
    dist.barrier()
    # The last step, as it ends the processes: the second one alone has pictures of two sizes.
    try:
        parted(Case({"encoder": Looping}))
        end = ""
    except (ValueError, RuntimeError) as error:
        end = f"{type(error).__name__}: {error}"
    torch.save(end, folder / f"ends-{rank}.pt")
    if rank == 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
