"""Features that were computed before training: of teachers for distillation, or of a frozen encoder.

They are found by a hash of an image's content, so they fit any record that holds it, in any order and under any id.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from litdata import StreamingDataset
from torch import Tensor

from lit_vlm.core.batch import Grid
from lit_vlm.core.written import write_whole
from lit_vlm.data.records import Image, RecordError, Videos, image_bytes
from lit_vlm.data.records.json_files import read_info

VERSION = 1
INFO = "prepared.json"
KEYS = "keys.npy"
Dtype = Literal["bfloat16", "int8"]


@dataclass(frozen=True)
class PreparedInfo:
    """What `prepared.json` of a prepared set says.

    Attributes:
        version: version of the format.
        what: name of the head whose teacher gave the features, or `encoder`.
        network: identity of the network whose features these are.
        preprocessing: how pictures were decoded and resized for it.
        sources: fingerprint of each source whose images are covered, by its name.
        images: number of different images.
        width: features per token.
        dtype: how features are stored; int8 with a scale for each channel of an image.
        error: mean of |stored − computed| divided by the mean of |computed|.
    """

    version: int
    what: str
    network: str
    preprocessing: str
    sources: dict[str, str]
    images: int
    width: int
    dtype: Dtype
    error: float

    def write(self, folder: Path) -> None:
        """Write `prepared.json`, the last file of a set."""
        write_whole(folder / INFO, json.dumps(asdict(self), indent=1) + "\n")


def image_key(content: bytes) -> int:
    """63 bits of a hash of an image's encoded bytes."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def pack_features(features: Tensor, grid: Grid, dtype: Dtype) -> tuple[dict[str, bytes], Tensor]:
    """Make the stored item of one image's features.

    Args:
        features: `[t, width]`.
        grid: layout of the tokens.
        dtype: how features are stored.

    Returns:
        the item, and the features `[t, width]` as they will be read back.
    """
    values = features.detach().float().cpu()
    if dtype == "int8":
        scale = (values.abs().amax(0) / 127).clamp(min=1e-12)
        content = (values / scale).round().to(torch.int8).numpy().tobytes()
        item = {"features": content, "scale": scale.numpy().tobytes()}
    else:
        item = {"features": values.bfloat16().view(torch.int16).numpy().tobytes(), "scale": b""}
    item["grid"] = np.array(grid, np.int32).tobytes()
    return item, unpack_features(item, dtype)[0]


def unpack_features(item: dict[str, bytes], dtype: Dtype) -> tuple[Tensor, Grid]:
    """Read a stored item: features `[t, width]`, in bf16, or fp32 if they were stored in int8; and their layout."""
    grid = Grid(*np.frombuffer(item["grid"], np.int32).tolist())
    if dtype == "int8":
        scale = torch.frombuffer(bytearray(item["scale"]), dtype=torch.float32)
        values = torch.frombuffer(bytearray(item["features"]), dtype=torch.int8)
        return values.view(grid.num_tokens, -1) * scale, grid
    values = torch.frombuffer(bytearray(item["features"]), dtype=torch.bfloat16)
    return values.view(grid.num_tokens, -1), grid


class Prepared:
    """A set that `lit-vlm prepare targets` wrote.

    Args:
        path: folder of the set.

    Raises:
        ValueError: for a folder that holds no prepared set, or one that is damaged or of another format.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        file = self.path / INFO
        if not file.is_file():
            raise ValueError(
                f"{self.path} holds no prepared features: it has no {INFO}. lit-vlm prepare targets makes them; work "
                "that was stopped goes on with the same command"
            )
        self.info = read_info(file, PreparedInfo, VERSION)
        self._keys = np.load(self.path / KEYS, mmap_mode="r")
        self._stream: tuple[int, StreamingDataset] | None = None

    def check(self, what: str, network: str, preprocessing: str, sources: dict[str, str]) -> None:
        """Check that these are the features that a run needs.

        Args:
            what: name of the head, or `encoder`.
            network: identity of the network that the run has there.
            preprocessing: how the run decodes and resizes pictures.
            sources: source → fingerprint, of the run's training data.

        Raises:
            ValueError: naming what differs.
        """
        stale = []
        for name, own, wanted in (
            ("made for", self.info.what, what),
            ("network", self.info.network, network),
            ("preprocessing", self.info.preprocessing, preprocessing),
        ):
            if own != wanted:
                stale.append(f"{name}: prepared with {own}, this run has {wanted}")
        for name, fingerprint in sources.items():
            if fingerprint not in self.info.sources.values():
                stale.append(f"data: source '{name}' ({fingerprint}) is not covered, only {self.info.sources}")
        if stale:
            raise ValueError(
                f"data.prepared.{what}: {self.path} does not fit this run. {'; '.join(stale)}. "
                f"Prepare again with lit-vlm prepare targets, or compute online with --data.prepared.{what} null"
            )

    def features(self, image: Image, folder: Path, videos: Videos | None = None) -> tuple[Tensor, Grid]:
        """Features `[t, width]` of an image, and their layout.

        Args:
            image: path, bytes or frame of a video.
            folder: what the path is relative to.
            videos: keeps a video open for its next frame.

        Raises:
            RecordError: `missing_features` for an image that the set lacks, as it could not be read when the set was
                made; and as `image_bytes`.
        """
        key = image_key(image_bytes(image, folder, videos))
        row = int(np.searchsorted(self._keys[0], key))
        if row == self._keys.shape[1] or self._keys[0, row] != key:
            raise RecordError("missing_features", f"{self.path} has no features of {image.path or 'an image'}")
        return unpack_features(self._items()[int(self._keys[1, row])], self.info.dtype)

    def _items(self) -> StreamingDataset:
        if self._stream is None or self._stream[0] != os.getpid():
            self._stream = (os.getpid(), StreamingDataset(str(self.path), shuffle=False))
        return self._stream[1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_stream": None}
