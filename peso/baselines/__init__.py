"""Recommenders without a language model, on the same stages and test cases: one file a baseline."""
