"""What is to be measured, and what was: plain data that processes send to each other as JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from lit_vlm.planning.bench.kernels import KernelTime
from lit_vlm.planning.job import Statistics

WARMUP = 5
"""Steps in front of the measured ones: kernels are chosen, the allocator and the loader fill."""


@dataclass(frozen=True)
class BenchJob:
    """A stage that is measured.

    Attributes:
        stage: its name.
        words: arguments of `lit-vlm fit`, behind the word fit.
        statistics: of the published data, by which records are made up where the stage's own are not there.
        steps: measured optimizer steps.
        profile: file for a trace of one more step.
        against: whether the same samples go through transformers' model instead.
    """

    stage: str
    words: tuple[str, ...]
    statistics: Statistics | None = None
    steps: int = 30
    profile: str | None = None
    against: bool = False

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(file: Path) -> BenchJob:
        """Read what `write` has written."""
        raw = json.loads(file.read_text(encoding="utf-8"))
        statistics = Statistics(*raw["statistics"]) if raw["statistics"] else None
        return BenchJob(**raw | {"words": tuple(raw["words"]), "statistics": statistics})


@dataclass
class Benched:
    """What was measured of a stage.

    Attributes:
        stage: its name.
        device: name of the device or processor.
        cuda: whether it is a GPU.
        simulated: whether it is one that does not exist, on which memory alone means something.
        processes: that trained together.
        per_node: of one machine.
        strategy: class of the strategy.
        precision: of the trainer.
        own_data: whether the stage's own data were there.
        batch_size: rows of a micro-batch.
        accumulate: micro-batches of a step.
        seconds: of all measured steps together, from a synchronised start to a synchronised end.
        counts: what all processes together trained on in them.
        phases: phase → seconds of each step, on the first process.
        model_flops: of the measured steps of all processes; None where they are not counted.
        peak_flops: FLOP/s of one device, where it is known.
        memory: bytes on the first device: `allocated` and `reserved` at most, `device` in use by all programs, and its
            size, `total`; of a processor, `process`: most memory of the process.
        kernels: kind → time of kernels in one micro-batch with its optimizer step; empty where no kernel is seen.
        messages: seconds of messages in it, and those beside which nothing ran; None where no kernel is seen.
        assumptions: what the measurement says of the shares of `roofline.Assumptions`.
        assumptions_from: how.
    """

    stage: str
    device: str
    cuda: bool
    processes: int
    per_node: int
    strategy: str
    precision: str
    own_data: bool
    batch_size: int
    accumulate: int
    seconds: float
    counts: dict[str, float]
    phases: dict[str, list[float]]
    model_flops: float | None
    peak_flops: float | None
    memory: dict[str, int]
    kernels: dict[str, KernelTime] = field(default_factory=dict)
    messages: tuple[float, float] | None = None
    simulated: bool = False
    assumptions: dict[str, float] = field(default_factory=dict)
    assumptions_from: str = ""

    @property
    def step_seconds(self) -> list[float]:
        """Seconds of each step."""
        return [sum(parts) for parts in zip(*self.phases.values(), strict=True)]

    @property
    def steps(self) -> int:
        """Number of measured steps."""
        return len(self.step_seconds)

    @property
    def mean_seconds(self) -> float:
        """Mean seconds of a step, pauses between epochs included."""
        return self.seconds / self.steps

    def rate(self, what: str) -> float:
        """Samples, tokens, images or another of `Counts` a second, on all devices."""
        return self.counts[what] / self.seconds

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices could do in that time; None where one of them is not known."""
        if self.model_flops is None or self.peak_flops is None:
            return None
        return self.model_flops / (self.seconds * self.peak_flops * self.processes)

    @property
    def data_wait(self) -> float:
        """Share of the time in which the device waited for the loader."""
        whole = sum(self.step_seconds)
        return sum(self.phases["data"]) / whole if whole else 0.0

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Benched:
        """Read what `write` has written."""
        raw = json.loads(file.read_text(encoding="utf-8"))
        raw["kernels"] = {kind: KernelTime(**one) for kind, one in raw["kernels"].items()}
        raw["messages"] = tuple(raw["messages"]) if raw["messages"] is not None else None
        return Benched(**raw)


@dataclass
class Reference:
    """What was measured of transformers' model.

    Attributes:
        seconds: of each optimizer step, without the loading of data.
        counts: what all of them held.
        allocated: most bytes that the allocator gave out; 0 without a GPU.
        reserved: most bytes that it reserved.
        attention: its implementation of attention.
    """

    seconds: list[float]
    counts: dict[str, float]
    allocated: int
    reserved: int
    attention: str

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second, without padding."""
        return self.counts["tokens"] / max(1e-9, sum(self.seconds))

    def write(self, file: Path) -> None:
        """Write it as JSON."""
        file.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @staticmethod
    def read(file: Path) -> Reference:
        """Read what `write` has written."""
        return Reference(**json.loads(file.read_text(encoding="utf-8")))


class Spread:
    """Median, and the values that 10 and 90 % do not exceed.

    Args:
        values: at least one.
    """

    def __init__(self, values: Sequence[float]) -> None:
        ordered = sorted(values)
        self.median = statistics.median(ordered)
        self.low = ordered[round(0.1 * (len(ordered) - 1))]
        self.high = ordered[round(0.9 * (len(ordered) - 1))]

    def to_json(self) -> dict[str, float]:
        """As plain data."""
        return {"median": self.median, "low": self.low, "high": self.high}
