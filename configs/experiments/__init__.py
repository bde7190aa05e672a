"""Experiments, one file each, in folders by network family or data."""
