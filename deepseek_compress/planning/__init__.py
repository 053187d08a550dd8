"""What a step needs, from shapes alone, and what that means on this machine."""
