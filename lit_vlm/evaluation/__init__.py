"""Trained models asked and scored: held-out records, benchmark tasks, probes."""
