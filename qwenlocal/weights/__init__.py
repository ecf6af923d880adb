"""Files of weights, read without an engine."""
