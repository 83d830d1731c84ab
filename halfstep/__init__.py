"""Halfstep: the one name under which everything is imported, in a clone (where its folders are links) and installed."""
