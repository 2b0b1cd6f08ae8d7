"""W + scale · (A ⊗ B), streamed."""
