"""What a run reads: text made into tokens once, and tokens handed out in an order anyone can recompute."""
