"""The engine: token ids in, token ids out, through the C interface of llama.cpp."""
