"""Scoring with OpenCompass itself, in an environment of its own, for its requirements clash with ours.

    from scoring.opencompass import score_with_opencompass, write_submission

What it answers can be scored here too: :func:`score_with_opencompass` leaves every answer in ``answers.jsonl``, the
form that ``python -m scoring rescore`` takes.
"""

from scoring.opencompass.running import score_with_opencompass
from scoring.opencompass.submission import Submission, write_submission
from scoring.opencompass.summary import read_summary

__all__ = ["Submission", "read_summary", "score_with_opencompass", "write_submission"]
