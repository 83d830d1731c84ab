"""Tasks that are made on the spot, without a network: training rows, held-out rows, and a task file."""
