"""Pre-training: settings, the loop, the optimiser and its schedule, checkpoints.

This file must exist: without it the script ``train.py`` beside the folder would shadow it.
"""
