"""What only a developer of Halfstep runs."""
