"""Measurements: fidelity of a conversion, speed of a model."""
