"""Scoring: a model folder in, score.json, Results.csv and a table out."""
