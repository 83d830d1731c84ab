"""The training state: out of DeepSpeed's wrappers, onto the disk, and back."""
