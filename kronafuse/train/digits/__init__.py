"""`kronafuse demo`: a Kronecker adapter learns handwritten digits that its base model has never seen."""
