"""The optimizers that are compared, and what each one's result is checked by."""
