"""Experts to nodes, then to ranks: pair swaps under a cap on the load, and replicas."""
