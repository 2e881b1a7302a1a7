"""Methods of local learning: which prompts are trained, and how a released gradient moves them."""
