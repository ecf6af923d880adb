"""Slash commands: `table` lists them, the other modules are their handlers, one module per subject."""
