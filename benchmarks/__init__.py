"""Everything that kvcal measures, a room for each: what is measured with its runner (README.md)."""
