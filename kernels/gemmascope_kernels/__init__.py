"""The operations Gemma 4 is made of: `reference` is their meaning in plain PyTorch, faster ones stand beside it."""
