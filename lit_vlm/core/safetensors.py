"""Reading the weight files of a published folder, and rounding them."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_vlm.core.pretrained import load_weights, shortened


def read_folder(source: str, only: re.Pattern[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a folder: safetensors, whole or in shards, or else pickled shards.

    Args:
        source: the folder.
        only: what the names of the wanted ones begin with; shards without any are not opened. None: all.

    Raises:
        ValueError: when there is no weight file, a file is damaged, or a file that the index names is missing.
    """
    folder = Path(source)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index, only)
        if (folder / name).is_file():
            return _wanted(load_weights(folder / name), only)
    raise ValueError(f"there is no model.safetensors and no pytorch_model.bin in {folder}")


def _wanted(state: dict[str, Tensor], only: re.Pattern[str] | None) -> dict[str, Tensor]:
    return state if only is None else {key: value for key, value in state.items() if only.match(key)}


def _read_shards(folder: Path, index: Path, only: re.Pattern[str] | None) -> dict[str, Tensor]:
    """The wanted tensors of the files that an index names; raises ValueError where one that it names is missing."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map, which says where each weight is")
    places = {key: shard for key, shard in places.items() if only is None or only.match(key)}
    shards = sorted({str(shard) for shard in places.values()})
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{folder} lacks {shortened(missing)}, which {index.name} names")
    state = {key: value for shard in shards for key, value in _wanted(load_weights(folder / shard), only).items()}
    if absent := [f"{key} ({places[key]})" for key in sorted(places) if key not in state]:
        raise ValueError(f"{index} names weights that its files lack: {shortened(absent)}")
    return state


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        ValueError: when the file is absent, is no JSON, or holds no object; names the file.
    """
    if not path.is_file():
        raise ValueError(f"{path.parent} has no {path.name}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, expected an object of settings")
    return found


def round_folder(folder: Path, dtype: torch.dtype) -> None:
    """Round all weights in the safetensors files of a folder to a type, and let its configurations say so.

    Args:
        folder: with files in it or in folders below; they are replaced one by one.
        dtype: what weights become; integers stay as they are.

    Raises:
        ValueError: for a weight that is beyond the type's range, naming it.
        OSError: where a file cannot be written.
    """
    name = str(dtype).removeprefix("torch.")
    sizes: dict[Path, int] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
            state = {key: _rounded(key, opened.get_tensor(key), dtype) for key in opened.keys()}  # noqa: SIM118
        rounded = file.with_suffix(".rounded")
        save_file(state, rounded, metadata)
        os.replace(rounded, file)
        sizes[file] = sum(value.nbytes for value in state.values())
    for index in folder.rglob("*.safetensors.index.json"):
        content = read_json(index)
        shards = {index.parent / shard for shard in content["weight_map"].values()}
        content.setdefault("metadata", {})["total_size"] = sum(sizes[shard] for shard in shards)
        index.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("config.json"):
        content = read_json(file)
        file.write_text(json.dumps(_saying(content, name), indent=2) + "\n", encoding="utf-8")


def _rounded(key: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value
    rounded = value.to(dtype)
    if bool(rounded.isinf().any()) and not bool(value.isinf().any()):
        raise ValueError(f"{key} has values beyond the range of {dtype}: up to {float(value.abs().max()):g}")
    return rounded


def _saying(content: dict[str, Any], name: str) -> dict[str, Any]:
    """A configuration whose types, and those of the models in it, are called `name`."""
    return {
        key: name if key in ("dtype", "torch_dtype") else _saying(value, name) if isinstance(value, dict) else value
        for key, value in content.items()
    }
