"""The ranks of a launch: how they meet, compare themselves, agree, and who is slow."""
