"""OpenCompass's command, for a configuration that lies beside this file.

    python run_opencompass.py CONFIG --work-dir outputs

The configuration of BIG-Bench-Hard imports ``os``, which mmengine knows for Python's own only where it lies below
/usr/lib/python or the interpreter's folder: not in a virtual environment of another Python, and not from 3.11 on, where
it is frozen. Its name among those of built-in modules settles that. The tasks that OpenCompass starts find the model
wrapper through PYTHONPATH.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)
    sys.builtin_module_names = (*sys.builtin_module_names, "os")

    from opencompass.cli.main import main  # type: ignore[import-not-found]

    main()
