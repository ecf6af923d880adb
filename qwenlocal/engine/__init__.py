"""Token ids in, token ids out: llama.cpp, spoken to through its C interface."""
