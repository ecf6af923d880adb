"""The Python API: load models and generate answers."""
