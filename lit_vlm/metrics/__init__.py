"""Metrics that torchmetrics lacks."""

from lit_vlm.metrics.text import exact_match, normalise_answer, token_f1

__all__ = ["exact_match", "normalise_answer", "token_f1"]
