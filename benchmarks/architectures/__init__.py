"""Which decoders of transformers work."""
