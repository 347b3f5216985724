"""Benchmarks: scripts that stand alone; a package only so that none shadows a package of the same name."""
