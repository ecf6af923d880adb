"""Model names, their resolution and download, and the store of installed models."""
