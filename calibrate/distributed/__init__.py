"""Several processes for one calibration, started by torchrun: who does what, and how their results become one."""

from .world import SINGLE, Finished, PeerLost, World, join, launched

__all__ = ["SINGLE", "Finished", "PeerLost", "World", "join", "launched"]
