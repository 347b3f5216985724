"""Pruning: a model folder in, a smaller plain model folder out."""
