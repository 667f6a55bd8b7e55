"""What methods lose on real models."""
