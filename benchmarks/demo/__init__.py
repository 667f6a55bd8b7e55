"""What was measured on the built-in model, since no real one answers it."""
