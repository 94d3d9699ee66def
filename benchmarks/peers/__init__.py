"""The ways to compute an operator that its benchmark compares, one file per operator."""
