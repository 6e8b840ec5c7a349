"""Agents: which parts, which losses, which optimiser groups."""
