"""MoonViT: pictures of any size, all patches of a batch in one row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from lit_vlm.core.backbones import NamedModel, check_one_source
from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import made_config, plain_config, resolve, shortened
from lit_vlm.core.safetensors import read_folder, read_json
from lit_vlm.core.transfer import send
from lit_vlm.encoders.base import HALF, Encoder, PatchGrid
from lit_vlm.encoders.layers import Merge, ReadLayers
from lit_vlm.encoders.windows import pixel_windows

MOONVIT = "kimi_k25_vision"
"""MoonViT's name in transformers, which has it as the tower of Kimi K2.5; for one frame both are the same network."""
SETTINGS = {
    "patch_size": ("patch_size",),
    "pos_emb_height": ("pos_emb_height", "init_pos_emb_height"),
    "pos_emb_width": ("pos_emb_width", "init_pos_emb_width"),
    "num_attention_heads": ("num_attention_heads", "vt_num_attention_heads"),
    "num_hidden_layers": ("num_hidden_layers", "vt_num_hidden_layers"),
    "hidden_size": ("hidden_size", "vt_hidden_size"),
    "intermediate_size": ("intermediate_size", "vt_intermediate_size"),
    "merge_kernel_size": ("merge_kernel_size",),
}
"""Setting of transformers → its names in the files of transformers, of Kimi-VL and of Kimi K2.5."""
TOWER = re.compile(r"^(model\.)?vision_tower\.")
OWN = re.compile(rf"{TOWER.pattern}|patch_embed\.|encoder\.|layers\.|final_layernorm\.")
"""Beginnings of the names of a tower's weights, in the files of a whole model and in its own."""
BLOCK = re.compile(r"^encoder\.blocks\.(\d+)\.(.+)$")
NAMES = {
    "norm0": "norm1",
    "norm1": "norm2",
    "mlp.fc0": "mlp.fc1",
    "mlp.fc1": "mlp.fc2",
    "wo": "attn.proj",
}
"""Published name of a layer in a block → its name in transformers."""


class MoonViT(NamedModel, Encoder):
    """MoonViT (Kimi-VL, arXiv 2504.07491, section 2.1), before the final norm and without the merge of patches.

    A picture keeps its shape: `data.transform` `NativeArea` resizes it to sides that are multiples of two patches. All
    patches of a batch are one row, in which a patch sees those of its own picture, so every block runs once per forward
    pass whatever the sizes. The table of positions is resized to each grid, and rows and columns are rotary positions,
    as published. Blocks behind the last that is read are not built.

    The projector of Kimi-VL folds 2 × 2 patches; so does `projectors.Downsample`.

    Args:
        name: hub name or local folder of the tower (`moonshotai/MoonViT-SO-400M`), or of a Kimi-VL or Kimi K2.5 that
            holds it, of which the tower alone is read; the weights come from there. Or null, with `config`.
        config: settings of a `kimi_k25_vision`, for random weights.
        layer: index into the hidden states: 0 the embeddings, −1 the last block, −2 the one before. Or several, see
            `merge`.
        merge: what becomes of several layers: `concat` puts their features side by side, `sum` adds them.

    Raises:
        ValueError: when not exactly one of `name` and `config` is given, for a model of another kind, or as
            `ReadLayers.of`.
    """

    layers: ReadLayers

    def __init__(
        self,
        name: str | None = None,
        config: dict[str, Any] | None = None,
        layer: int | list[int] = -1,
        merge: Merge = "concat",
    ) -> None:
        super().__init__()
        check_one_source("MoonViT", name, config)
        self.name = name
        self.config: Any = made_config(MOONVIT, config, "MoonViT") if config is not None else _published_config(name)
        self.layers = ReadLayers.of(layer, merge, self.config.num_hidden_layers, name or "this config")
        self.config.num_hidden_layers = self.layers.last
        self.backbone = AutoModel.from_config(self.config, dtype=torch.get_default_dtype())
        self.backbone.final_layernorm = nn.Identity()
        self.width = self.config.hidden_size * self.layers.times
        self.patch_grid = PatchGrid(self.config.patch_size)
        self.pixels = PixelSpec(None, self.config.patch_size * self.config.merge_kernel_size[0], HALF)
        self._set_normalisation(HALF, HALF)

    def pretrained_state(self) -> StateDict | None:
        """Weights of the embeddings and the kept blocks, in any of the published forms; none else is read.

        Raises:
            ValueError: when the files lack weights of the backbone, or have them in other shapes; names them.
        """
        if self.name is None:
            return None
        source = resolve(self.name)
        found = {TOWER.sub("", key): value for key, value in read_folder(source, OWN).items()}
        state = _renamed(found, self.config.num_attention_heads)
        problems = []
        for key, own in self.backbone.state_dict().items():
            if key not in state:
                problems.append(f"{key} (missing)")
            elif state[key].shape != own.shape:
                problems.append(f"{key} ({tuple(state[key].shape)} instead of {tuple(own.shape)})")
        if problems:
            raise ValueError(f"{source} has no weights for {shortened(problems)} of MoonViT")
        return {f"backbone.{key}": state[key].float() for key in self.backbone.state_dict()}

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments with the configuration of the kept blocks in place of the name, and the last of them read."""
        return {**arguments, "name": None, "config": plain_config(self.config), "layer": self.layers.from_last}

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks."""
        return list(self.backbone.layers)

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, picture by picture, row by row.

        Raises:
            ValueError: as `check_multiples`.
        """
        self.check_multiples(images)
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        windows = pixel_windows(images, self.config.patch_size, 1).flatten(0, 1)
        patches = self.normalise(windows, next(self.backbone.parameters()).dtype)  # [t, 3, p, p]
        # On the host, which knows all sizes: attention reads there where pictures end, and nothing waits.
        with torch.device("cpu"):
            shapes = torch.tensor([(1, grid.rows, grid.cols) for grid in grids])
            table = self.backbone.patch_embed.pos_emb
            points, weights = get_vision_interpolation_indices_and_weights(
                shapes,
                table.num_grid_per_side,
                mode=table.interpolation_mode,
                align_corners=table.interpolation_align_corners,
            )
            geometry = {
                "position_ids": get_vision_position_ids(shapes, 1),
                "interp_indices": points,
                "interp_weights": weights,
                "frame_index": torch.zeros(len(patches), dtype=torch.int64),  # none of a film
                # What merges patches, whose result nothing reads, is given one patch.
                "temporal_merge_index": torch.zeros(1, 1, dtype=torch.int64),
            }
        given = {key: send(value, patches.device) for key, value in geometry.items()}

        def run() -> Tensor:
            states: Tensor = self.backbone(patches, shapes, **given).last_hidden_state
            return states

        return VisualTokens(self.layers.states(run, self.blocks()), grids)


def _published_config(name: str | None) -> PretrainedConfig:
    """The configuration of a folder or hub name, whose `config.json` is of a tower or of a model that holds one.

    The files of the tower and of Kimi-VL name classes that come as code with them, which is not run.
    """
    file = Path(resolve(str(name), weights=False)) / "config.json"
    found = read_json(file)
    found = found.get("vision_config", found)
    if found.get("model_type", MOONVIT) not in (MOONVIT, "moonvit"):
        raise ValueError(f"MoonViT knows moonvit and {MOONVIT}; '{found['model_type']}' in {file} is not one of them")
    settings = {own: found[key] for own, keys in SETTINGS.items() for key in keys if key in found}
    if "hidden_size" not in settings:
        raise ValueError(f"{file} describes no MoonViT: it has none of {', '.join(SETTINGS['hidden_size'])}")
    return made_config(MOONVIT, settings, "MoonViT")


def _renamed(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """Weights of a tower under the names of transformers, in which queries, keys and values are apart."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        match = BLOCK.match(key)
        if match is None:
            key = key.removeprefix("encoder.").replace("pos_emb.weight", "pos_emb.position_embeddings")
            found[key] = value
            continue
        block, rest = match.groups()
        layer, _, kind = rest.rpartition(".")
        if layer == "wqkv":
            for one, part in zip("qkv", value.chunk(3), strict=True):
                found[f"layers.{block}.attn.{one}_proj.{kind}"] = part if one == "v" else _halves(part, heads)
        else:
            found[f"layers.{block}.{NAMES.get(layer, layer)}.{kind}"] = value
    return found


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys whose rotary pairs are neighbours → pairs of which one is in each half of a head."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
