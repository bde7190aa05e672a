"""Configurations: readable Python files, each with one experiment."""
