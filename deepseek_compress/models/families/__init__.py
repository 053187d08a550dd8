"""One file a family: its configuration, its tensors and how its blocks run."""
