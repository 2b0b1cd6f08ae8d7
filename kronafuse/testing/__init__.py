"""Named cases, inputs and accuracy limits, shared by tests and benchmarks."""
