"""What kvcal ships so that everything works without a network: a text, a task and a trained model."""
