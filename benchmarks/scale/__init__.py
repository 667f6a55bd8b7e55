"""What calibration and prompts cost."""
