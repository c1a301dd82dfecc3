"""Curation: steps that decide which records of sources are trained on."""

from lit_vlm.data.curation.curate import Curation, curate
from lit_vlm.data.curation.file import read_curation
from lit_vlm.data.curation.pictures import Classifier, Format, Score, Size
from lit_vlm.data.curation.sampling import Sample
from lit_vlm.data.curation.step import Measure, Measured, Step, Verdict
from lit_vlm.data.curation.texts import Text

STEPS: dict[str, type[Step]] = {kind.__name__: kind for kind in (Size, Format, Text, Score, Sample)}
"""The kit's steps by the bare names that curation files use."""

__all__ = [
    "STEPS",
    "Classifier",
    "Curation",
    "Format",
    "Measure",
    "Measured",
    "Sample",
    "Score",
    "Size",
    "Step",
    "Text",
    "Verdict",
    "curate",
    "read_curation",
]
