"""What a run will need and take: memory, time, hours and money, from one way to train one shape."""
