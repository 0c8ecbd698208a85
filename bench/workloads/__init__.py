"""What the optimizers work on: networks, training problems, stacks of matrices."""
