"""y = x Wᵀ + scale · x (A ⊗ B)ᵀ: `kron_linear`, `kron_delta` and `kron_linear_group`, one engine."""
