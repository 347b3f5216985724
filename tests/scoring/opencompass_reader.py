"""Configurations as OpenCompass itself reads them: its wheel and mmengine, from the package index, without the rest of
what it needs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import cache_folder, new_folder, turn

PARSER = ["opencompass==0.3.1", "mmengine-lite==0.10.7", "addict==2.4.0", "yapf==0.43.0", "termcolor", "platformdirs"]


def _packages() -> Path:
    """OpenCompass's wheel and what reads its configurations, from the package index; without the rest of its needs."""
    folder = cache_folder() / "opencompass-parser"
    with turn(folder):  # tests of another process want it, too
        if not folder.exists():
            with new_folder(folder) as temporary:
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(temporary)]
                subprocess.run([*pip, *PARSER, "setuptools<81"], check=True, timeout=300, capture_output=True)
    return folder


PARSE = """
import json, sys
sys.builtin_module_names += ("os",)  # as run_opencompass.py does
from mmengine.config import Config
Config.fromfile(sys.argv[1], format_python_code=False).dump(sys.argv[1] + ".plain.py")
config = Config.fromfile(sys.argv[1] + ".plain.py", format_python_code=False).to_dict()
for dataset in config["datasets"]:
    dataset["max_out_len"] = dataset["infer_cfg"]["inferencer"].get("max_out_len")
print(json.dumps(config))
"""


def parsed(config: Path) -> dict:
    """A configuration as the real reader of OpenCompass sees it."""
    try:
        packages = _packages()
    except subprocess.SubprocessError:
        pytest.skip(f"needs a package index that has {', '.join(PARSER)}")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PARSE, config.name],
        cwd=config.parent,
        env=os.environ | {"PYTHONPATH": f"{packages}{os.pathsep}{config.parent}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
