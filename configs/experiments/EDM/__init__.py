"""Experiments with the EDM networks on CIFAR-10."""
