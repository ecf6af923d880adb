"""Checkpoints and GGUF files: read, convert, quantize, compare and repair them."""

# Bump when the converter's output changes (tests/test_convert.py notices). Conversions that an earlier version started
# are not resumed. A local checkpoint that it converted is converted again; for one from a hub, a note says so.
CONVERTER_VERSION = 1
