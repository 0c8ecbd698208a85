"""What trainers need to build and to feed these optimizers; each file imports its own trainer."""
