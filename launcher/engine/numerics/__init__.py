"""The arithmetic of a step: loss scale, skipped steps, repairs of DeepSpeed, and what fp16 loses."""
