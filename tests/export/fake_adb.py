"""A stand-in for adb and an emulated phone behind it.

Keeps to adb's command line: ``devices``, ``-s SERIAL shell COMMAND``, ``-s SERIAL push LOCAL REMOTE``, with adb's words
and exit codes. The phone is a folder. Its shell is this machine's, where /data and /proc/meminfo lie in the folder;
programs for aarch64 run under qemu-user. :class:`Phone` sets it up; run as a program, this file is adb.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

PROPERTIES = {
    "ro.product.manufacturer": "Palmtop",
    "ro.product.model": "Stand-in",
    "ro.product.cpu.abilist": "arm64-v8a",
    "ro.soc.manufacturer": "QEMU",
    "ro.soc.model": "user",
    "ro.build.version.release": "15",
    "ro.kernel.qemu": "1",
}

STATE = {
    "devices": {"EMU5554": "device"},
    "properties": PROPERTIES,
    "memory_kb": 8_000_000,
    "storage_kb": 50_000_000,
    "cpu": "max",
    "fault": "",
    "answer": None,
}
"""What a test may set. ``fault``: no-server, full, damaged, interrupted, unplugged or killed; ``answer``: what is
printed instead of what the runner would."""

BATTERY = "Current Battery Service state:\n  AC powered: false\n  USB powered: true\n  level: 83\n  temperature: 314"

THERMAL = """\
IsStatusOverride: false
Thermal Status: 0
Cached temperatures:
	Temperature{mValue=0.0, mType=0, mName=old, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=41.5, mType=0, mName=CPU0, mStatus=0}
	Temperature{mValue=33.0, mType=3, mName=skin, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=0, mType=2, mName=cpu}"""


class Phone:
    """The stand-in as a test sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.adb = folder / "adb"
        (folder / "data" / "local" / "tmp").mkdir(parents=True)
        self.adb.write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {__file__} {folder} "$@"\n')
        self.adb.chmod(0o755)
        self.behave()

    def behave(self, **changes: object) -> None:
        """Start from :data:`STATE` with changes."""
        (self.folder / "state.json").write_text(json.dumps(STATE | changes))

    def files(self) -> set[str]:
        """What lies in the phone's folder of ours."""
        root = self.folder / "data" / "local" / "tmp" / "palmtop"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def pushed(self) -> list[str]:
        """Names of the files that were pushed since the last call."""
        log = self.folder / "pushed"
        names = log.read_text().split() if log.exists() else []
        log.unlink(missing_ok=True)
        return names


def main(folder: Path, words: list[str]) -> int:
    state = json.loads((folder / "state.json").read_text())
    if state["fault"] == "no-server":
        return fail(
            "* daemon not running; starting now at tcp:5037\nadb: failed to check server version: cannot connect"
        )
    if words == ["devices"]:
        print("List of devices attached")
        print("".join(f"{serial}\t{name}\n" for serial, name in state["devices"].items()))
        return 0
    flag, serial, command, *rest = words
    assert flag == "-s", words
    if state["devices"].get(serial) != "device":
        return fail(f"error: device '{serial}' not found")
    return {"shell": shell, "push": push}[command](folder, state, *rest)


def shell(folder: Path, state: dict, command: str) -> int:
    runs = "./runner" in command
    if runs and state["fault"] == "unplugged":
        return fail("error: device 'EMU5554' not found")
    if runs and state["fault"] == "killed":
        command = f"kill -{signal.SIGKILL.value} $$"
    if runs and state["answer"] is not None:
        print(state["answer"])
        return 0
    (folder / "meminfo").write_text(f"MemTotal: {state['memory_kb']} kB\nMemAvailable: {state['memory_kb']} kB\n")
    answers = {
        "getprop": "".join(f"[{name}]: [{value}]\n" for name, value in state["properties"].items()),
        "dumpsys battery": BATTERY,
        "dumpsys thermalservice || true": THERMAL,
        "dumpsys power": "POWER MANAGER (dumpsys power)\n  mWakefulness=Asleep",
        "df -k /data/local/tmp/palmtop": "Filesystem     1K-blocks  Used Available Use% Mounted on\n"
        f"/dev/block/dm-5 99999999 1 {state['storage_kb']}   1% /data",
    }
    if command in answers:
        print(answers[command])
        return 0
    command = command.replace("/data/", f"{folder}/data/").replace("/proc/meminfo", f"{folder}/meminfo")
    command = re.sub(r"(?<=&& )(?=\./ld-linux)", f"qemu-aarch64 -cpu {state['cpu']} ", command)
    code = subprocess.run(["sh", "-c", command], env=os.environ | {"TVM_BIND_THREADS": "0"}, check=False).returncode
    return code if code >= 0 else 128 - code


def push(folder: Path, state: dict, local: str, remote: str) -> int:
    name = Path(local).name
    target = folder / remote.lstrip("/")
    if state["fault"] == "full":
        return fail(f"adb: error: failed to copy '{local}' to '{remote}': remote write failed: No space left on device")
    with open(folder / "pushed", "a") as log:
        print(name, file=log)
    shutil.copy(local, target)
    if state["fault"] in ("damaged", "interrupted") and name == "tensor-cache.json":
        target.write_bytes(target.read_bytes()[:-1])
    if state["fault"] == "interrupted" and name == "tensor-cache.json":
        return fail(f"adb: error: failed to copy '{local}' to '{remote}': device offline")
    print(f"{local}: 1 file pushed, 0 skipped. 30.1 MB/s ({target.stat().st_size} bytes in 0.001s)")
    return 0


def fail(text: str) -> int:
    print(text, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
