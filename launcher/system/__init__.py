"""What lies under everything: files, the screen, the clock, the environment; no knowledge of training."""
