"""An existing plan and new traffic: which few experts to move, and whether that pays."""
