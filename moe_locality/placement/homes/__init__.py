"""Home ranks of requests: predictions for new ones, and who goes where."""
