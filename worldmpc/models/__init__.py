"""Networks, heads and world models."""
