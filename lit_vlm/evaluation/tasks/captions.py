"""Captions: COCO and Flickr30k, Karpathy's splits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import ClassVar

from lit_vlm.data.records import Image
from lit_vlm.evaluation.metrics import Cider
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task

REQUEST = "Provide a one-sentence caption for the provided image."


class Captions(Task):
    """Karpathy's JSON of a data set; the score is CIDEr × 100."""

    main = "cider"
    max_new_tokens = 32
    demonstration_split = "train"
    file: ClassVar[str]
    pictures: ClassVar[str] = ""
    """The folder of pictures, where the JSON file does not name it."""

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        splits = ("train", "restval") if split == "train" else (split,)  # "restval": COCO's, trained on as well
        found = []
        for number, entry in enumerate(self.field(self.json(self.file), "images", list, self.file)):
            where = f"{self.file} image {number}"
            if self.field(entry, "split", str, where) not in splits:
                continue
            captions = tuple(
                self.field(sentence, "raw", str, f"{where} sentence {i}").strip()
                for i, sentence in enumerate(self.field(entry, "sentences", list, where))
            )
            name = self.field(entry, "filename", str, where)
            image = Image(path=str(PurePosixPath(str(entry.get("filepath") or self.pictures), name)))
            found.append(Example(name, (image,), REQUEST, captions))
        return found

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """CIDEr-D × 100; the weights of words come from the references of the scored pictures."""
        metric = Cider()
        for one in outcomes:
            metric.update(one.answer, one.example.references)
        return {"cider": 100 * float(metric.compute())}


class CocoCaptions(Captions):
    """COCO captions, Karpathy's test split of 5,000 pictures."""

    name = "coco_captions"
    about = "captions of COCO's pictures; CIDEr"
    files = (
        "dataset_coco.json (Karpathy's splits, cs.stanford.edu/people/karpathy/deepimagesent) and val2014/, train2014/"
    )
    file = "dataset_coco.json"


class Flickr30k(Captions):
    """Flickr30k captions, Karpathy's test split of 1,000 pictures."""

    name = "flickr30k"
    about = "captions of Flickr's pictures; CIDEr"
    files = "dataset_flickr30k.json (Karpathy's splits) and flickr30k-images/ (shannon.cs.illinois.edu/DenotationGraph)"
    file = "dataset_flickr30k.json"
    pictures = "flickr30k-images"
