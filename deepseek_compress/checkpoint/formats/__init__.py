"""Encodings of weights: pure functions between stored parts and values, one file a format."""
