"""What is made of checkpoints: a list of them, the same one for other ranks, a model for everybody, and its use."""
