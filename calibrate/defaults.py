"""What is taken where nobody says, for programs and commands alike."""

NUM_TOKENS = 131072
"""Tokens of a calibration pass, BOS and separators included."""
RESERVOIR = 4096
"""Sampled tokens. On SmolLM2 half of them cost `spectral` 0.0022 ± 0.0003 more attention error at a sixteenth of the
bytes (of 0.099) and `xcla` 0.0025 ± 0.0008 (of 0.144); a quarter cost 0.0081 and 0.41 (docs/results/real.md)."""
PLAN_BYTES = 0.0625
"""What a plan reads, of what dense attention reads in the layers with full attention."""
