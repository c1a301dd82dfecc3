"""Evaluation of trained models: held-out records, benchmark tasks, probes."""
