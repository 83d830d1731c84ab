"""What a corpus and its tokenizer say of themselves: read and checked, without torch."""
