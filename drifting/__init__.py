"""One-step image generation by drifting (arXiv 2602.04770)."""
