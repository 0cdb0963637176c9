"""Experiments: runs that change something, and what followed."""
