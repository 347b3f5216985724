"""Imported by the server process that forks the loader's workers, and by nothing else.

The server must outlive the signals that ask a job to stop: when it ends its workers end too, in the
middle of the training process's last step.
"""

import data.worker  # noqa: F401  (what every worker needs, imported once)
from common import signals

signals.ignore()
