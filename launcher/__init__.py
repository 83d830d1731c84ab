"""Halfstep's launcher: from a request to a trained model (spec -> plan -> engine)."""
