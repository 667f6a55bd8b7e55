"""Tasks with answers: where their samples come from, and how a prediction is scored."""
