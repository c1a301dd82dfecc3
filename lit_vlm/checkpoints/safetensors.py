"""Reading the weight files of a published folder."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from torch import Tensor

from lit_vlm.pretrained import load_weights

PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.json", "pytorch_model*.bin")


def read_folder(source: str) -> dict[str, Tensor]:
    """All tensors of a folder or hub repository: safetensors, whole or in shards, or else pickled shards.

    Raises:
        ValueError: when there is no weight file, or a shard that the index names is missing.
    """
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=list(PATTERNS)))
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [shard for shard in shards if not (folder / shard).is_file()]
            if missing:
                raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index.name} names")
            return {key: value for shard in shards for key, value in load_weights(folder / shard).items()}
        if (folder / name).is_file():
            return load_weights(folder / name)
    raise ValueError(f"there is no model.safetensors and no pytorch_model.bin in {folder}")
