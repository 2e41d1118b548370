"""Experts to nodes under one price of imbalance, replicas, then experts to ranks."""
