"""How a run writes its samples, so that whoever asks its model later writes them in the same way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lit_vlm.data.sample.encode import SampleEncoder
from lit_vlm.data.sample.spec import InputSpec
from lit_vlm.data.sample.spelling import spelling_of
from lit_vlm.data.sample.templates import Template
from lit_vlm.data.sample.transforms import ImageTransform


@dataclass(frozen=True)
class SampleFormat:
    """What decides the ids and pixels of a record, besides the model.

    Attributes:
        template: how messages are written.
        transform: how pictures are resized.
        max_length: positions per sample at most.
        fast_jpeg: decode a JPEG at a fraction of its size where that leaves enough.
    """

    template: Template
    transform: ImageTransform
    max_length: int
    fast_jpeg: bool

    def check_marks(self, spec: InputSpec, action: Literal["refuse", "warn"]) -> None:
        """See that the tokenizer knows what the template writes as one token each.

        Args:
            spec: of the model.
            action: `refuse` where training begins anew, `warn` where it goes on or a trained model is asked.

        Raises:
            ValueError: naming the template, the marks and the tokenizer, if the action is `refuse`.
        """
        marks = self.template.marks(spec.tokenizer.eos_token or "")
        spelling_of(spec.tokenizer).check(marks, f"data.template {type(self.template).__name__}", action)

    def sample_encoder(
        self, spec: InputSpec, too_long: Literal["truncate", "drop"] = "drop", prompt: bool = False, extra: int = 0
    ) -> SampleEncoder:
        """What makes samples; see `check_marks` for marks that the tokenizer does not know.

        Args:
            spec: of the model.
            too_long: whether a longer sample loses its tail or is refused.
            prompt: write only up to the next answer.
            extra: positions on top of `max_length`.
        """
        length = self.max_length + extra
        return SampleEncoder(spec, self.template, self.transform, length, too_long, prompt, self.fast_jpeg)
