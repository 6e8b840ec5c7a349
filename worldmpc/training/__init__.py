"""One visible training loop, and the hooks around it."""
