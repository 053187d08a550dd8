"""Compression of a linear and of a model: solver, scheme, transforms, collection, conversion without data."""
