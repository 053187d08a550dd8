"""Requirements of a step from shapes alone, and their cost on this machine."""
