"""SubGen: its settings and policy, the sketch, and attention over it."""

from .policy import SubGen

__all__ = ["SubGen"]
