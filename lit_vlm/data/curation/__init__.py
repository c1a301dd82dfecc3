"""Curation: steps that decide which records of sources are trained on."""
