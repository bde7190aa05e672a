"""Experiments on the scikit-learn digits (8x8), which need no download."""
