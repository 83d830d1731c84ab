"""What was asked: run keys, where each came from, and what makes two requests the same run."""
