"""What was seen: records, quantities derived from them, and where they go; never torch."""
