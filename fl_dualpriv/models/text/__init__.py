"""Text towers of the models: their weights, rows of tokens, and forward passes from embeddings."""
