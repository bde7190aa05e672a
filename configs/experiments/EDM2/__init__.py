"""Experiments with the EDM2 networks on ImageNet-64."""
