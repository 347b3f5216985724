"""Export: a model folder in; an MLC folder, compiled libraries and measurements out."""
