"""kvpress on the prompts of `calibrate evaluate`."""
