"""Memory: tokens of a batch by page, where they lie, and what of them lies on the host. It knows no method."""
