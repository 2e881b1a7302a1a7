"""Text towers that map prompts to class features, with vector-Jacobian products."""
