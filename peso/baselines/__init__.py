"""Recommenders without a language model, evaluated on the same stages and test cases. One file per
baseline."""
