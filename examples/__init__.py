"""Runnable examples, and the real models and data that they use."""
