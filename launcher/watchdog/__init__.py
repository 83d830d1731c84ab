"""Who watches a rank and ends it: signals, heartbeats, watchdogs, and how an attempt ended. Standard library only."""
