"""Experiments on two-dimensional data whose flow map is known."""
