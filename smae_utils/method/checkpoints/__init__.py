"""Weights into a network: from a run of this package, or from another library."""
