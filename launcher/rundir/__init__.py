"""What lies in a run directory: who may start it, what was decided, how each attempt went and ended."""
