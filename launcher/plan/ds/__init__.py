"""The DeepSpeed config: composed from fragments or adopted from a file, every key checked."""
