"""Other ways to place experts, for comparison: none of them is what ``solve`` does by default."""
