"""Curation: steps that decide which records of sources are trained on."""

from lit_vlm.data.curation.clusters import Clusters
from lit_vlm.data.curation.curate import Curation, curate
from lit_vlm.data.curation.device import DeviceMeasure
from lit_vlm.data.curation.dual_encoder import DualEncoder
from lit_vlm.data.curation.file import read_curation
from lit_vlm.data.curation.pictures import Classifier, Format, Score, Size
from lit_vlm.data.curation.same_pictures import EmbeddingDuplicates, ExactDuplicates, PerceptualDuplicates
from lit_vlm.data.curation.sampling import Sample
from lit_vlm.data.curation.similarity import Similarity
from lit_vlm.data.curation.step import Measure, Measured, Step, Verdict
from lit_vlm.data.curation.texts import Text

_STEPS: tuple[type[Step], ...] = (
    Size, Format, Text, Score, Similarity, Clusters, ExactDuplicates, PerceptualDuplicates, EmbeddingDuplicates, Sample,
)  # fmt: skip
STEPS: dict[str, type[Step]] = {kind.__name__: kind for kind in _STEPS}
"""The kit's steps by the bare names that curation files use."""

__all__ = [
    "STEPS",
    "Classifier",
    "Clusters",
    "Curation",
    "DeviceMeasure",
    "DualEncoder",
    "EmbeddingDuplicates",
    "ExactDuplicates",
    "Format",
    "Measure",
    "Measured",
    "PerceptualDuplicates",
    "Sample",
    "Score",
    "Similarity",
    "Size",
    "Step",
    "Text",
    "Verdict",
    "curate",
    "read_curation",
]
