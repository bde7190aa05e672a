"""FID, step sweeps, expected results and the comparison of runs."""
