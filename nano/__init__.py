"""How the built-in model is made: data, training, publication. Not needed to use it."""
