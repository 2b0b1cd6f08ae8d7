"""residual + scale · (act(x · downᵀ + down_bias) · upᵀ + up_bias), fused."""
