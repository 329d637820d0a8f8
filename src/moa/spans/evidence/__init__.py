"""What a search needs to know and what it has to prove: calibration texts, attention influence, validation."""
