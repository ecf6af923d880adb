"""The Python interface: models that answer, and what loads them."""
