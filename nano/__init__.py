"""The making of the built-in model: data, training, publication. Not needed to use it."""
