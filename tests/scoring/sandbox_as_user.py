"""Runs programs in boxes as an ordinary user, started by root: programs and timeout come as JSON, outcomes go so too.

    python -m tests.scoring.sandbox_as_user < request.json

The project and its interpreter may lie in root's home, so they are opened to the user first.
"""

import json
import sys
from dataclasses import asdict

from scoring.sandbox import bubblewrap, run_programs, user
from tests.conftest import ROOT

if __name__ == "__main__":
    request = json.load(sys.stdin)
    interpreter = bubblewrap.Interpreter.current()
    opened = [folder for name in bubblewrap.binaries() for folder in bubblewrap.needed_folders(name, interpreter)]
    user.become_unused_user([str(ROOT), *dict.fromkeys(opened)])
    json.dump([asdict(outcome) for outcome in run_programs(**request)], sys.stdout)
