"""Contract tests for classes of other packages. A class that breaks a rule ends its test by an AssertionError.

Contract tests need neither pytest nor files, and run on a CPU in seconds. A test of a part is a line:

    def test_my_projector() -> None:
        check_projector(MyProjector)

`check_sharded` runs parts on one process and on two under FSDP2. docs/extending.md explains the rules.
"""

from lit_vlm.testing.adapters import check_adapters, with_adapters
from lit_vlm.testing.data import check_source, check_template, check_transform
from lit_vlm.testing.language import check_decoder, check_embedder
from lit_vlm.testing.losses import check_head, check_teacher
from lit_vlm.testing.sharded import Case, check_sharded
from lit_vlm.testing.tasks import check_task
from lit_vlm.testing.tiny import CLIP, LLAMA, tiny_decoder, tiny_slots
from lit_vlm.testing.vision import check_encoder, check_projector

__all__ = [
    "CLIP",
    "LLAMA",
    "Case",
    "check_adapters",
    "check_decoder",
    "check_embedder",
    "check_encoder",
    "check_head",
    "check_projector",
    "check_sharded",
    "check_source",
    "check_task",
    "check_teacher",
    "check_template",
    "check_transform",
    "tiny_decoder",
    "tiny_slots",
    "with_adapters",
]
