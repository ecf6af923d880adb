"""Qwen1.5 on your laptop: download a model once, chat with it offline ever after."""

__version__ = "0.1.0"
