"""What is done to a linear and to a model: solver, scheme, transforms, collection, conversion without data."""
