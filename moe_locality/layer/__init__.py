"""TODO: re-exports of this package (its owner writes this)."""
