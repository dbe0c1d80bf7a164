"""Pictures, the explorer, and what the notebooks need beside the method."""
