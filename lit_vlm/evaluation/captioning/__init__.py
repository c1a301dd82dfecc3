"""New captions for the pictures of a set, by a run of the kit or a model of transformers."""

from __future__ import annotations

from lit_vlm.evaluation.captioning.captioner import Answer, Captioner, Inputs, RunCaptioner
from lit_vlm.evaluation.captioning.checks import Checks
from lit_vlm.evaluation.captioning.models import CaptionModel
from lit_vlm.evaluation.captioning.work import CaptionSettings, caption

__all__ = ["Answer", "CaptionModel", "CaptionSettings", "Captioner", "Checks", "Inputs", "RunCaptioner", "caption"]
