"""Text alone: perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_vlm.data.sources import Texts
from lit_vlm.tasks.base import Example, Outcome, Task


class Perplexity(Task):
    """How well a decoder predicts documents: e to the mean negative log-likelihood of a token."""

    name = "perplexity"
    about = "text only: perplexity of documents, which are cut at the run's max_length"
    files = ".txt files with one document per line, or .jsonl files with a field 'text'"
    main = "perplexity"
    perplexity = True

    def _examples(self) -> Sequence[Example]:
        found = []
        for file in self.paths(".txt", ".jsonl"):
            source = Texts(str(file))
            for index in range(len(source)):
                record = source.record(index)
                if record.messages[0].role != "document":
                    raise ValueError(f"task perplexity: {file} entry {index} is a question; it takes a field 'text'")
                found.append(Example(f"{file.name}-{index}", (), record.messages[0].text, ()))
        return found

    def score(self, outcomes: Sequence[Outcome]) -> dict[str, float]:
        """`perplexity`, and `loss` in nats per token."""
        loss = sum(one.nll for one in outcomes) / max(1, sum(one.tokens for one in outcomes))
        return {"perplexity": math.exp(min(loss, 700.0)), "loss": loss}
