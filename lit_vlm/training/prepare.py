"""Features of a teacher or of a frozen encoder, computed once for all images of a stage's data.

Any number of processes share the blocks of records (`data.sets.shared`); at the end the blocks are merged into one set.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from litdata.streaming.writer import BinaryWriter
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_vlm.core.batch import ENCODER, Images, VisualTokens
from lit_vlm.core.precision import autocast
from lit_vlm.data.datamodule import VLMData
from lit_vlm.data.records import RecordError, Videos, image_bytes
from lit_vlm.data.records.json_files import read_info
from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.prepared import INFO, KEYS, VERSION, Dtype, PreparedInfo, image_key, pack_features
from lit_vlm.data.sets.engine import HERE, Engine, paths_of
from lit_vlm.data.sets.parallel import Block, blocks_of
from lit_vlm.data.sets.shards import CHUNK_BYTES, block_folder, claim, merge, read_block
from lit_vlm.data.sets.shared import OpenWork, Work, finish_once, run_models
from lit_vlm.data.sources import Source
from lit_vlm.heads import Head
from lit_vlm.training.module import LitVLM

BLOCK = 1024
Network = Callable[[Images], VisualTokens]


@dataclass(frozen=True)
class PrepareSettings:
    """How features are prepared.

    Attributes:
        dtype: number format in which features are stored.
        batch_size: records whose images are taken together.
        workers: loader processes of each device.
        precision: precision that the network runs in: `trainer.precision` of the training that will read the features.
    """

    dtype: Dtype = "bfloat16"
    batch_size: int = 32
    workers: int = 0
    precision: str = "32-true"


class _Pictures(Dataset[list[tuple[int, Tensor]]]):
    """The images of each record of one block, as (key, pixels) in the form that one network takes."""

    def __init__(self, sources: Sequence[Source], encode: SampleEncoder, what: str, block: Block) -> None:
        self.sources, self.encode, self.what, self.block = sources, encode, what, block
        self._ends = list(accumulate(len(source) for source in sources))

    def __len__(self) -> int:
        return self.block.end - self.block.start

    def __getitem__(self, index: int) -> list[tuple[int, Tensor]]:
        local = index + self.block.start
        which = bisect_right(self._ends, local)
        source = self.sources[which]
        local -= self._ends[which - 1] if which else 0
        found = []
        try:
            with Videos() as videos:
                for image in source.record(local).images:
                    content = image_bytes(image, source.image_folder, videos)
                    pixels = self.encode.pixels(image, source.image_folder, videos)[self.what]
                    found.append((image_key(content), pixels))
        except RecordError:
            return []  # training will drop the record and say why
        return found


def _join(records: Sequence[list[tuple[int, Tensor]]]) -> list[tuple[int, Tensor]]:
    return [pair for record in records for pair in record]


def network_of(module: LitVLM, what: str) -> Network:
    """The encoder, or the teacher of the head named `what`.

    Raises:
        ValueError: when the model has neither.
    """
    if what == ENCODER:
        return module.vlm.encoder
    heads = {name: head for name, head in module.vlm.heads.items() if isinstance(head, Head) and head.teacher}
    if what not in heads:
        raise ValueError(f"there is nothing to prepare for '{what}'; this model has {', '.join([ENCODER, *heads])}")
    teacher = heads[what].teacher
    assert teacher is not None
    return teacher


def features_work(module: LitVLM, data: VLMData, what: str, settings: PrepareSettings, device: str) -> Work:
    """What computes and writes the features of one block.

    Args:
        module: with its model built.
        data: gives training sources, transform and decoding of images.
        what: name of a head, or `encoder`.
        settings: how features are computed and stored.
        device: that the network runs on.

    Raises:
        ValueError: when the model has no such network.
    """
    sources, encode, network = data.given_train, data.sample_encoder(module.input_spec), network_of(module, what)
    if what == ENCODER:  # teachers follow their images
        module.vlm.encoder.to(device)

    def work(block: Block, folder: Path) -> dict[str, Any]:
        pictures = _Pictures(sources, encode, what, block)
        loader = DataLoader(pictures, settings.batch_size, num_workers=settings.workers, collate_fn=_join)
        return _write_block(network, loader, folder, settings, device)

    return work


def write_blocks(data: VLMData, what: str, out: Path, work: OpenWork, engine: Engine = HERE) -> None:
    """Compute the blocks that no other process does; returns when all are whole, whoever computed them.

    Args:
        data: whose training sources are read.
        what: name of a head, or `encoder`.
        out: folder of the set.
        work: opens the network on a device (`features_work`), in each process that computes.
        engine: starts the workers.

    Raises:
        ValueError: for a worker that cannot take part, saying why.
    """
    run_models(_blocks(data), work, out, f"preparing {what}", engine, paths_of(*data.given_train))


def _blocks(data: VLMData) -> list[Block]:
    return blocks_of(sum(len(source) for source in data.given_train), BLOCK)


@torch.no_grad()
def _write_block(
    network: Network,
    batches: DataLoader[list[tuple[int, Tensor]]],
    folder: Path,
    settings: PrepareSettings,
    device: str,
) -> dict[str, Any]:
    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    keys: list[int] = []
    seen: set[int] = set()
    width, written, error, total = 0, 0, 0.0, 0.0
    for pictures in batches:
        new = [(key, pixels) for key, pixels in dict(pictures).items() if key not in seen]
        if not new:
            continue
        images = Images.pack([pixels for _, pixels in new]).to(device)
        with autocast(settings.precision, torch.device(device).type):
            tokens = network(images)
        width = tokens.features.shape[1]
        lengths = [grid.num_tokens for grid in tokens.grids]
        for (key, _), features, grid in zip(new, tokens.features.split(lengths), tokens.grids, strict=True):
            item, stored = pack_features(features, grid, settings.dtype)
            writer.add_item(len(keys), item)
            written += sum(map(len, item.values()))
            keys.append(key)
            seen.add(key)
            computed = features.float().cpu()
            error += float((stored.float() - computed).abs().sum())
            total += float(computed.abs().sum())
    writer.done()
    return {"keys": keys, "bytes": written, "width": width, "error": error, "total": total}


def begin(module: LitVLM, data: VLMData, what: str, out: Path, dtype: Dtype) -> bool:
    """Claim the folder `out` for these features, or check that it is theirs; call it before any `write_blocks`.

    Returns:
        whether there is something left to do.

    Raises:
        ValueError: when the folder holds something else, or the model has no network of that name.
    """
    network_of(module, what)
    spec = module.input_spec
    fingerprints = [source.fingerprint() for source in data.given_train]
    how = f"{spec.networks[what]} {data.sample_encoder(spec).preprocessing()}"
    digest = hashlib.sha256(how.encode()).hexdigest()[:16]
    plan = {"version": VERSION, "what": what, "sources": fingerprints, "network": digest, "dtype": dtype}
    claim(out, plan, BLOCK)
    return not (out / INFO).is_file()


def finish(module: LitVLM, data: VLMData, what: str, out: Path, dtype: Dtype) -> PreparedInfo:
    """Merge the blocks of all processes into one set, once; what `prepared.json` of the set says.

    Raises:
        ValueError: when blocks are missing, or hold no features at all.
    """
    finish_once(out, INFO, lambda: _merge(module, data, what, out, dtype))
    return read_info(out / INFO, PreparedInfo, VERSION)


def _merge(module: LitVLM, data: VLMData, what: str, out: Path, dtype: Dtype) -> None:
    sources, blocks = data.given_train, _blocks(data)
    written = [read_block(out, block.index) for block in blocks]
    if not any(one["keys"] for one in written):
        names = ", ".join(f"'{source.name}'" for source in sources)
        raise ValueError(
            f"there is nothing to prepare: no record of {names} in data.train has an image that can be read. "
            "lit-vlm data convert lists why"
        )
    merge([block_folder(out, block.index) for block in blocks], out)
    keys = np.array([key for one in written for key in one["keys"]], np.int64)
    # Blocks that have the same image each store it; the first copy is read.
    unique, rows = np.unique(keys, return_index=True)
    np.save(out / KEYS, np.stack([unique, rows.astype(np.int64)]))
    spec = module.input_spec
    info = PreparedInfo(
        version=VERSION,
        what=what,
        network=spec.networks[what],
        preprocessing=data.sample_encoder(spec).preprocessing(),
        sources={source.name: source.fingerprint() for source in sources},
        images=len(unique),
        width=max((one["width"] for one in written), default=0),
        dtype=dtype,
        error=sum(one["error"] for one in written) / max(1e-12, sum(one["total"] for one in written)),
    )
    info.write(out)
