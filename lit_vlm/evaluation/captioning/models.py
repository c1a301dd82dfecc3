"""Which model writes captions, as a small object that pickles and says what it is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lit_vlm.checkpoints.folder import run_folder
from lit_vlm.core.pretrained import is_hub_name, resolve
from lit_vlm.data.sources.base import hash_files
from lit_vlm.evaluation.asker import check_run, load_run
from lit_vlm.evaluation.captioning.captioner import Captioner, RunCaptioner
from lit_vlm.evaluation.captioning.hf import HFCaptioner, check_hf


@dataclass(frozen=True)
class CaptionModel:
    """A model that is not loaded yet.

    Attributes:
        name: what the user named it.
        source: the checkpoint of a run, or the folder of a model of transformers.
        is_run: which of the two it is.
        dtype: type of the weights, such as `bfloat16`.
        trust: whether code that the folder brings may run.
    """

    name: str
    source: str
    is_run: bool
    dtype: str
    trust: bool = False

    @classmethod
    def of_run(cls, name: str, checkpoint: Path, dtype: str) -> CaptionModel:
        """A checkpoint of the kit; raises ValueError as `check_run`."""
        check_run(checkpoint)
        return cls(name, str(checkpoint), True, dtype)

    @classmethod
    def of_transformers(cls, name: str, dtype: str, trust: bool = False) -> CaptionModel:
        """A model of transformers by its folder or hub name, which is fetched; raises ValueError as `check_hf`."""
        folder = resolve(name)
        check_hf(folder, trust)
        return cls(name, folder, False, dtype, trust)

    def identity(self) -> dict[str, str]:
        """What decides its answers: the revision of a hub name, or a hash of the files that it is read from."""
        source = Path(self.source)
        if not self.is_run and is_hub_name(self.name):
            return {"kind": "transformers", "revision": source.name, "dtype": self.dtype}
        files = [source] if source.is_file() else [file for file in source.rglob("*") if file.is_file()]
        if self.is_run:
            files.append(run_folder(source) / "config.yaml")
        kind = "run" if self.is_run else "transformers"
        return {"kind": kind, "fingerprint": hash_files(sorted(files)), "dtype": self.dtype}

    def load(self, device: str) -> Captioner:
        """The model on a device; raises ValueError as `load_run` or `HFCaptioner`."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        if self.is_run:
            return RunCaptioner(load_run(self.source, device, dtype))
        return HFCaptioner(self.source, device, dtype, self.trust)
