"""Mixtures of methods."""
