"""Checkpoints on disk: what one is, how it comes to be there whole or not at all, and how it is read again."""
