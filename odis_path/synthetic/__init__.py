"""Synthetic H&E-like slides with annotations, for the demo and the tests."""
