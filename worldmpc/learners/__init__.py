"""What turns batches into steps of parameters; agents put these together."""
