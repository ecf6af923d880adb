"""Conversion of checkpoints on a hub while they are downloaded, without keeping the original."""
