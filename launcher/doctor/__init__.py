"""What a machine has and how fast it is: checked before a run needs it."""
