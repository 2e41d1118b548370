"""How few copies any placement can have: relaxations, certificates and proofs."""
