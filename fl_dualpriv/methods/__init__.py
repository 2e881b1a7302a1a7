"""Methods of local learning: the prompts that they train, and the steps that a released gradient makes."""
