"""The interface of a family of published weights: one system's own names and files, read and written."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lit_vlm.checkpoints.published.layout import SlotStates
from lit_vlm.data.sample.format import SampleFormat
from lit_vlm.model.vlm import VLM


class Family(ABC):
    """Published weights of one system. A class of another package is named by its path, `my_lab.families.Mine:FOLDER`.

    Attributes:
        name: what stands in front of the colon in `start_from: NAME:FOLDER`.
        model_types: values of `model_type` in the config.json of the family's folders; another family's are refused.
        row_ends: whether its models may have a word's vector behind each row of patches (`Splice.row_end`).
    """

    name: str
    model_types: tuple[str, ...] = ()
    row_ends: bool = False

    @abstractmethod
    def read(self, source: str) -> SlotStates:
        """Weights by slot under the parts' own names: encoder, projector, embedder, decoder, and `heads.NAME`.

        Args:
            source: a folder or hub name with config and weights.

        Raises:
            ValueError: for a key that belongs to no slot, or an absent setting.
        """

    def load(self, source: str | Path | Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> VLM:
        """The model that the configuration describes, with all weights; a family need not have this.

        Args:
            source: a folder or hub name, or a state dict under published names.
            config: the published configuration; needed with a state dict.

        Raises:
            ValueError: for a key that belongs to no slot, a weight that no key gives, an absent setting, or a family
                that is only read.
        """
        raise ValueError(f"the family {self.name} is one to start from (model.stage.start_from); it builds no model")

    def export(self, model: VLM, out: Path, written: SampleFormat | None = None) -> float:
        """Write a model under published names, read it back, and compare logits; a family need not have this.

        Args:
            model: of the parts that the family consists of, without adapters.
            out: a folder that is new or empty.
            written: template and transform of its data.

        Returns:
            the largest difference of the logits on a random picture and text, in fp32.

        Raises:
            ValueError: for a model of other parts, a folder that is not empty, logits that differ, or a family that is
                only read.
        """
        raise ValueError(f"the family {self.name} is one to start from (model.stage.start_from); it writes nothing")
