"""Published training runs of other trainers, which calibrate the forecast and score it."""
