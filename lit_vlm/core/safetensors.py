"""Reading the weight files of a published folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.core.pretrained import load_weights, shortened


def read_folder(source: str) -> dict[str, Tensor]:
    """All tensors of a folder: safetensors, whole or in shards, or else pickled shards.

    Raises:
        ValueError: when there is no weight file, a file is damaged, or a file that the index names is missing.
    """
    folder = Path(source)
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _read_shards(folder, index)
        if (folder / name).is_file():
            return load_weights(folder / name)
    raise ValueError(f"there is no model.safetensors and no pytorch_model.bin in {folder}")


def _read_shards(folder: Path, index: Path) -> dict[str, Tensor]:
    """All tensors of the files that an index names; raises ValueError where one that it names is missing."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise ValueError(f"{index} has no weight_map, which says where each weight is")
    shards = sorted({str(shard) for shard in places.values()})
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ValueError(f"{folder} lacks {shortened(missing)}, which {index.name} names")
    state = {key: value for shard in shards for key, value in load_weights(folder / shard).items()}
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
