"""Tensors and model files: configuration, checkpoint, tokenizer and the arithmetic; no network."""
