"""Where views meet the model: each function here runs or reads it, and hands arrays and answers to a widget."""
