"""The block loop and what it needs: hidden states on disk, batches, experts, two models side by side, the head."""
