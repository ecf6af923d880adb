"""Chats with models on other machines, over the OpenAI API."""
