"""What can be read from a model: lenses, attribution, heads, probes."""
