"""The work: one training process, from a Plan to metrics, over DeepSpeed."""
