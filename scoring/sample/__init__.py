"""The competition suite on eight items of each format, written for this project: for trying the whole path offline.

The files are a folder of data like any other, with demonstrations of their own (``shots.json``). ``sample.json`` marks
it, so that a score on it is called a sample wherever it is shown.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
"""What ``--data`` would be given."""
