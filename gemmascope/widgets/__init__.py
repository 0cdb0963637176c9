"""Views: arrays and strings in, HTML or traits out. A leaf: nothing here imports model code."""
