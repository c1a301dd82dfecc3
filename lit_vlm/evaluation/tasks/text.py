"""Text alone: perplexity, MMLU."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence

from lit_vlm.data.records.files import visible
from lit_vlm.data.sources import Texts
from lit_vlm.evaluation.tasks.base import Example, Outcome, Task
from lit_vlm.evaluation.tasks.choice import MultipleChoice


class Perplexity(Task):
    """Perplexity of documents: e to the mean negative log-likelihood of a token."""

    name = "perplexity"
    about = "text only: perplexity of documents, which are cut at the run's max_length"
    files = ".txt files with one document per line, or .jsonl files with a field 'text'"
    main = "perplexity"
    lower = ("perplexity", "loss")
    perplexity = True

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
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


class MMLU(MultipleChoice):
    """MMLU (Hendrycks et al. 2021), test: text alone, 57 subjects; demonstrations are those of the same subject."""

    name = "mmlu"
    about = "text only: exams of 57 subjects, by likelihood of the letter"
    files = "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv without header (github.com/hendrycks/test)"
    instruction = ""
    groups = "subject"
    demonstration_split = "dev"
    choosing = "letter"
    same_group = True

    def read(self, split: str) -> list[Example]:
        """The questions of a split; raises as `Task.read` does."""
        tables = visible(self.path(split).glob(f"*_{split}.csv"))
        if not tables:
            raise ValueError(f"task mmlu: {self.folder / split} has no *_{split}.csv. It reads {self.files}")
        found = []
        for table in tables:
            subject = table.stem.removesuffix(f"_{split}")
            with table.open(newline="", encoding="utf-8") as file:
                try:
                    rows = list(csv.reader(file))
                except UnicodeDecodeError as error:
                    raise ValueError(f"task mmlu: {table} is not UTF-8: {error}") from error
                for number, row in enumerate(rows, 1):
                    where = f"{table.name} line {number}"
                    if len(row) != 6:
                        raise ValueError(f"task mmlu: {where} has {len(row)} columns: question, A, B, C, D, answer")
                    right = self.by_letter(row[1:5], row[5], where)
                    found.append(Example(f"{split}-{subject}-{number}", (), row[0], (right,), tuple(row[1:5]), subject))
        return found
