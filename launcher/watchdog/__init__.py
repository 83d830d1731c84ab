"""Who watches a rank and ends it: signals, heartbeats, wardens, and how an attempt ended. Standard library only."""
