"""Serving engines that decode from an artifact, each with its own memory and scheduler."""
