"""How weights are stored: pure functions between stored parts and values, one file a format."""
