"""Plain torch: what every operator computes. Imports nothing of lmops; tests take it as the truth, in float64."""
