"""A checkpoint as a model of lmms-eval: `lmms-eval --model lit_vlm --model_args checkpoint=RUN --tasks ...`.

Needs the extra `lmms-eval`, which is not imported by anything else. lmms-eval finds this module by its entry point.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image as PILImage
from rich.progress import track

from lit_vlm.core.launcher import launch
from lit_vlm.core.precision import choose
from lit_vlm.data.records import Image, Message, Record, RecordError, Text
from lit_vlm.data.records.media import MARK
from lit_vlm.data.sample.encode import Sample
from lit_vlm.data.sources.conversations import interleave
from lit_vlm.evaluation.asker import load_run, pick_device

MANIFEST = ModelManifest(model_id="lit_vlm", simple_class_path="lit_vlm.evaluation.lmms_eval.LmmsEvalModel")


class LmmsEvalModel(lmms):
    """A model of lmms-eval that answers requests with the template and the image transform of its run.

    Args:
        checkpoint: a checkpoint, or the folder of a run.
        device: where the model runs; default: a GPU if there is one.
        batch_size: requests at a time.
        max_length: positions of a prompt at most; default: that of the run.

    Raises:
        ValueError: when lmms-eval was started with several processes, or as `load_run`.
    """

    is_simple = True

    def __init__(
        self,
        checkpoint: str,
        device: str | None = None,
        batch_size: int | str = 1,
        max_length: int | str | None = None,
    ) -> None:
        super().__init__()
        if launch().world_size > 1:
            raise ValueError("lit_vlm answers lmms-eval in one process: start it without torchrun, accelerate or srun")
        place = pick_device(device)
        asker = load_run(checkpoint, place, choose(torch.device(place).type, scaled=False).dtype)
        self.rows = int(batch_size)
        length = int(max_length or asker.format.max_length)
        self.asker = replace(asker, format=replace(asker.format, max_length=length))

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """An answer to each request, greedy or drawn at the task's temperature, cut at the task's stop texts.

        Raises:
            ValueError: for a request with video or sound.
        """
        answers: list[str] = []
        for start in track(range(0, len(requests), self.rows), description="answering"):
            chunk = requests[start : start + self.rows]
            # A task may give each request its own settings: such requests are asked one by one.
            settings = [dict(request.args[1]) for request in chunk]
            groups = [chunk] if all(one == settings[0] for one in settings) else [[request] for request in chunk]
            for group in groups:
                answers += self._generate(group)
        return answers

    def _generate(self, requests: Sequence[Instance]) -> list[str]:
        """Answers to requests with equal settings; "" for those that cannot be asked."""
        settings = dict(requests[0].args[1])
        samples = [self._encode(self._record(*self._asked(request)), request) for request in requests]
        asked = [sample for sample in samples if sample is not None]
        if not asked:
            return [""] * len(requests)
        temperature = float(settings.get("temperature") or 0) if settings.get("do_sample", True) else 0.0
        given = iter(
            self.asker.answer(
                asked, int(settings.get("max_new_tokens", 64)), temperature, float(settings.get("top_p") or 1)
            )
        )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else list(until)
        return ["" if sample is None else _cut(next(given), stops) for sample in samples]

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Log-likelihood in nats of each continuation as an answer, and whether it is the greedy answer.

        A request that cannot be asked has −inf and False.

        Raises:
            ValueError: for a request with video or sound.
        """
        found = []
        for request in track(requests, description="scoring"):
            context, target, visual, index, task, split = request.args
            document = self.task_dict[task][split][index]
            answer = target if isinstance(target, str) else target(document)
            record = self._record(context, list(visual(document) or []), answer.strip())
            prompt = self._encode(record, request)
            if prompt is None:
                found.append((-math.inf, False))
                continue
            ((nll, tokens),), _ = self.asker.score_answers([record])
            (given,) = self.asker.answer([prompt], tokens)
            found.append((-nll, given.strip() == answer.strip()))
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not supported; raises NotImplementedError."""
        raise NotImplementedError("lit_vlm answers single rounds only; tasks of several rounds are not supported")

    def _encode(self, record: Record, request: Instance) -> Sample | None:
        """The prompt of a request; None, with a warning, if it is too long or its picture is broken."""
        try:
            return self.asker.encode([record])[0]
        except RecordError as error:
            _, _, _, index, task, _ = request.args
            warnings.warn(f"{task} document {index} counts as unanswered: {error}", stacklevel=2)
            return None

    def _asked(self, request: Instance) -> tuple[str, list[Any]]:
        context, _, visual, index, task, split = request.args
        return context, list(visual(self.task_dict[task][split][index]) or [])

    def _record(self, context: str, visuals: Sequence[Any], answer: str = " ") -> Record:
        images = [_image(visual) for visual in visuals]
        pieces = context.split(MARK)
        if len(pieces) - 1 == len(images) and images:
            content = tuple(interleave(pieces, images))
        else:
            content = (*images, Text(f"\n{context.replace(MARK, '')}" if images else context))
        return Record("lmms", "lmms", (Message("user", content), Message("assistant", (Text(answer),))))


def _image(visual: Any) -> Image:
    """A picture that lmms-eval hands over; raises ValueError for video and sound."""
    if isinstance(visual, str):
        return Image(path=str(Path(visual).resolve()))
    if not isinstance(visual, PILImage.Image):
        raise ValueError(f"lit_vlm takes pictures; this task gives {type(visual).__name__}")
    buffer = io.BytesIO()
    visual.convert("RGB").save(buffer, format="PNG")
    return Image(data=buffer.getvalue(), size=visual.size)


def _cut(answer: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            answer = answer.split(stop, 1)[0]
    return answer.strip()
