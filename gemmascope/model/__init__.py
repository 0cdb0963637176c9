"""Gemma 4, written to be read from top to bottom: `text` is the model, `moe` its experts."""
