"""Install MLC-LLM's app on a connected phone and bring the model's files to where the app looks for them.

This file stands alone: it lies in a bundle beside ``mlc/`` and needs Python and adb.

    python bundle_weight.py --apk-path MLCChat.apk
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

APP = "ai.mlc.mlcchat"
"""What Android calls the app of MLC-LLM."""

MODELS = f"/storage/emulated/0/Android/data/{APP}/files"
"""Where on the phone it looks for models."""

STAGING = "/data/local/tmp"
"""Where adb may write."""


def main() -> None:
    """The command."""
    here = Path(__file__).absolute().parent
    parser = argparse.ArgumentParser(description="Install MLC-LLM's app and bring this folder's model to it.")
    parser.add_argument("--apk-path", type=Path, required=True, help="the app, as it was packaged for this model")
    parser.add_argument("--mlc-path", type=Path, default=here / "mlc", help="the model's files. Default: mlc/ here")
    parser.add_argument("--adb", default="adb", help="the adb program")
    asked = parser.parse_args()
    for path in (asked.apk_path, asked.mlc_path / "mlc-chat-config.json"):
        if not path.is_file():
            parser.error(f"{path} is not there")
    packaged = json.loads((here / "convert" / "mlc-package-config.json").read_text(encoding="utf-8"))
    name = packaged["model_list"][0]["model_id"]
    for words in commands(asked.apk_path, asked.mlc_path, name):
        print("adb", *words, flush=True)
        code = subprocess.run([asked.adb, *words], check=False).returncode
        if code:
            sys.exit(code)
    print(f"open MLCChat on the phone and choose {name}")


def commands(apk: Path, mlc: Path, name: str) -> list[list[str]]:
    """The words after ``adb``: install, copy to where adb may write, move to where the app reads."""
    return [
        ["install", "-r", str(apk)],
        ["shell", f"rm -rf {STAGING}/{name} {MODELS}/{name}"],
        ["push", str(mlc), f"{STAGING}/{name}"],
        ["shell", f"mkdir -p {MODELS} && mv {STAGING}/{name} {MODELS}/"],
    ]


if __name__ == "__main__":
    main()
