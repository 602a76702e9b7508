"""Measurements on real models and real text, each one command; their results stand in docs/results."""
