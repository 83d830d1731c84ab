"""How a run starts: the command line of each starter, and the processes behind it."""
