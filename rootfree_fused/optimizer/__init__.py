"""What the optimizers share: groups, declared state, the step, checkpoints."""
