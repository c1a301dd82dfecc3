"""Ablations: variants × seeds of a recipe in one file, their shared stages, statistics and report."""
