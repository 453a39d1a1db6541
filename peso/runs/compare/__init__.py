"""Comparisons: many runs from one configuration, with shared work."""
