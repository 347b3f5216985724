"""Throughput on a connected phone: ``python -m export phone DIR``.

What is measured is what export/runner does: prefill and decode on the phone's processor, with the library that fits
it. An emulated device is told by itself and never gives a throughput.
"""

import json
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from common.console import Console
from common.errors import UserError
from common.files import gigabytes, sha256, write_json
from common.settings import to_dict
from export.adb import Adb, PhoneError, connect
from export.bench import Spread, measurement, protocol
from export.runner_folder import START, runner_folder
from export.settings import PhoneCommand

FILE = "phone.json"

REMOTE = "/data/local/tmp/palmtop"
"""The folder on the phone; it keeps the last model, so that a second run copies nothing."""

NOT_MEASURED = 3
"""Exit code where no phone was measured."""

ABI = "arm64-v8a"

SPARE_MEMORY = 300 * 2**20
"""Bytes that the runner needs beside weights and cache."""

SPARE_STORAGE = 100 * 2**20
"""Bytes that stay free on the phone."""


@dataclass(frozen=True)
class File:
    """A file that the phone needs."""

    local: Path
    remote: str
    """Below :data:`REMOTE`."""

    @property
    def size(self) -> int:
        """Bytes."""
        return self.local.stat().st_size


def phone_command(command: PhoneCommand) -> None:
    """Measure an exported folder on the connected phone and write ``phone.json``.

    Raises:
        UserError: the folder has no library for a phone, or several phones are connected.
        SystemExit: with 3 where nothing was measured, after a line that says why.
    """
    assert command.folder is not None
    console, folder = Console(), Path(command.folder)
    out = Path(command.out) if command.out is not None else folder / FILE
    record = read_export(folder)
    console.settings("phone", to_dict(command) | {"out": str(out)})
    try:
        result = _measure(command, folder, record, console)
    except PhoneError as reason:
        _not_measured(str(reason))
    write_json(out, result)
    console.table(f"{out}", _rows(result))
    if result["emulated"]:
        _not_measured(f"{result['device']['model'] or 'the device'} is emulated, and its speed means nothing")
    console.say(f"\nphone: {out}\nto free the phone's storage: adb shell rm -r {REMOTE}")


def _not_measured(reason: str) -> NoReturn:
    print(f"not measured: {reason}", file=sys.stderr, flush=True)
    sys.exit(NOT_MEASURED)


def read_export(folder: Path) -> dict[str, Any]:
    """The record of an exported folder that has libraries for a phone."""
    try:
        record: dict[str, Any] = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no exported folder: its export.json cannot be read; python -m export MODEL makes one"
        ) from error
    if not any(one["target"] == "android-cpu" for one in record["libraries"]):
        raise UserError(f"{folder} has no library for a phone; export the model again with --target host,android-cpu")
    return record


def _measure(command: PhoneCommand, folder: Path, record: dict[str, Any], console: Console) -> dict[str, Any]:
    adb = connect(command.adb, command.serial)
    device = describe(adb)
    if ABI not in device["abis"]:
        raise PhoneError(f"{device['model']} runs {', '.join(device['abis'])}, and the library is for {ABI}")
    require_memory(adb, record)
    push(adb, files(folder, record), console)
    before = state(adb)
    if before["awake"] is False:
        console.warn("the phone's screen is off, and its processor may be held back; switch it on for the measurement")
    console.say(f"measuring on {device['model']}")
    found = _run(adb, command, console)
    after = state(adb)
    emulated = device["emulated"] or not found["arm"]
    speed = None if emulated else asdict(measurement("phone", found["threads"], found))
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "emulated": emulated,
        "device": device,
        "model": record["model"],
        "dtype": record["dtype"],
        "context": found["context"],
        "library": found["library"],
        "threads": found["threads"],
        "settings": protocol(command),
        "load_seconds": None if emulated else found["load_seconds"],
        "measurement": speed,
        "before": before,
        "after": after,
    }


def describe(adb: Adb) -> dict[str, Any]:
    """What a device says of itself."""
    properties = dict(re.findall(r"^\[(.+?)\]: \[(.*)\]$", adb.shell("getprop").replace("\r", ""), re.MULTILINE))

    def one(*names: str) -> str:
        return next((properties[name] for name in names if properties.get(name)), "")

    emulator = "1" in (one("ro.kernel.qemu"), one("ro.boot.qemu")) or one("ro.hardware") in ("ranchu", "goldfish")
    return {
        "serial": adb.serial,
        "model": f"{one('ro.product.manufacturer')} {one('ro.product.model')}".strip(),
        "soc": f"{one('ro.soc.manufacturer')} {one('ro.soc.model', 'ro.board.platform', 'ro.hardware')}".strip(),
        "android": one("ro.build.version.release"),
        "build": one("ro.build.fingerprint"),
        "abis": one("ro.product.cpu.abilist", "ro.product.cpu.abi").split(","),
        "memory": _memory(adb, "MemTotal"),
        "emulated": emulator,
    }


def state(adb: Adb) -> dict[str, Any]:
    """What heat and power are like: temperatures in degrees Celsius, the battery in percent."""
    battery = adb.shell("dumpsys battery")
    thermal = adb.shell("dumpsys thermalservice || true")  # from Android 10
    level, tenths = (_number(battery, rf"^\s*{name}: (-?\d+)") for name in ("level", "temperature"))
    current = thermal.partition("Current temperatures from HAL:")[2].partition("Current cooling devices")[0]
    awake = re.search(r"mWakefulness=(\w+)", adb.shell("dumpsys power"))
    return {
        "battery_percent": level,
        "battery_celsius": None if tenths is None else tenths / 10,
        "charging": "powered: true" in battery,
        "thermal_status": _number(thermal, r"^\s*Thermal Status: (\d+)"),
        "celsius": {name: float(value) for value, name in re.findall(r"mValue=([-\d.]+),.*?mName=([^,}]+)", current)},
        "awake": awake[1] == "Awake" if awake else None,
    }


def require_memory(adb: Adb, record: dict[str, Any]) -> None:
    """Raise where the phone's free memory does not hold weights and cache."""
    # The CPU's cache is in fp32, the record's in fp16.
    weights = record["memory"]["weights"] * (2 if record["dtype"] == "f32" else 1)
    needed, free = weights + 2 * record["memory"]["cache"] + SPARE_MEMORY, _memory(adb, "MemAvailable")
    if free < needed:
        raise PhoneError(
            f"the phone has {gigabytes(free)} of memory free, and the model needs {gigabytes(needed)}; "
            "close apps, or take a smaller model or --context"
        )


def files(folder: Path, record: dict[str, Any]) -> list[File]:
    """All that the phone needs: the runner's folder, both libraries, the weights."""
    found = [File(file, file.name) for file in sorted(runner_folder().iterdir())]
    for one in record["libraries"]:
        if one["target"] == "android-cpu":
            found.append(File(folder / one["file"], one["file"].rpartition("-")[2]))
    weights = [folder / "mlc" / "tensor-cache.json", *sorted((folder / "mlc").glob("params_shard_*.bin"))]
    return found + [File(file, f"weights/{file.name}") for file in weights]


def push(adb: Adb, wanted: list[File], console: Console) -> None:
    """Copy what the phone does not have yet; what an interrupted run has copied whole stays.

    Raises:
        PhoneError: the phone has no room, or a file arrives damaged.
    """
    adb.shell(f"mkdir -p {REMOTE}/weights")
    there, digests = _digests(adb), {file.remote: sha256(file.local) for file in wanted}
    stale = [name for name, digest in there.items() if digests.get(name) != digest]
    for name in stale:
        adb.shell(f"rm -f '{REMOTE}/{name}'")
    missing = [file for file in wanted if there.get(file.remote) != digests[file.remote]]
    total, free = sum(file.size for file in missing), _storage(adb)
    if free < total + SPARE_STORAGE:
        raise PhoneError(
            f"the phone has {gigabytes(free)} of storage free, and {gigabytes(total + SPARE_STORAGE)} are needed"
        )
    done = 0
    console.start(total, 0)
    try:
        for file in missing:
            adb.push(file.local, f"{REMOTE}/{file.remote}")
            done += file.size
            console.progress(done, total, {"copied": f"{gigabytes(done)} of {gigabytes(total)}"})
    finally:
        console.stop()
    there = _digests(adb)
    damaged = [name for name, digest in digests.items() if there.get(name) != digest]
    if damaged:
        raise PhoneError(f"{', '.join(damaged)} arrived damaged; run again, with another cable if it stays so")


def _digests(adb: Adb) -> dict[str, str]:
    """The sha256 of each file in the folder on the phone."""
    listed = adb.shell(f"cd {REMOTE} && find . -type f -exec sha256sum {{}} +").splitlines()
    return {name.removeprefix("./"): digest for digest, name in (line.split(maxsplit=1) for line in listed)}


def _run(adb: Adb, command: PhoneCommand, console: Console) -> dict[str, Any]:
    """What the runner prints, once it has measured."""
    asked = protocol(command) | {"prompts": ",".join(map(str, command.prompts)), "threads": command.threads}
    words = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in asked.items())
    found: dict[str, Any] | None = None
    for line in adb.lines(f"cd {REMOTE} && chmod 755 ld-linux-aarch64.so.1 && {START} {words}"):
        if line.startswith("{"):
            found = json.loads(line)
        else:
            console.say(line)
    if found is None:
        raise PhoneError("the runner ended without a result")
    return found


def _rows(result: dict[str, Any]) -> dict[str, str]:
    """The result in a few lines."""
    device, before, after = result["device"], result["before"], result["after"]
    heat = [f"{one['battery_celsius']} °C, {one['battery_percent']}%" for one in (before, after)]
    rows = {
        "phone": f"{device['model']}, {device['soc']}, Android {device['android']}",
        "library": f"{result['library']}, {result['dtype']} weights, {result['threads']} threads",
        "battery": f"{heat[0]} before, {heat[1]} after",
    }
    measured = result["measurement"]
    if measured is not None:
        for prompt in measured["prompts"]:
            speeds = {name: Spread(**prompt[name]) for name in ("prefill", "decode")}
            first = f"first token after {1000 * prompt['first_token']['median']:.0f} ms"
            text = ", ".join(f"{name} {speed} tok/s" for name, speed in speeds.items())
            rows[f"prompt of {prompt['tokens']:,}"] = f"{text}, {first}"
        rows["memory"] = f"{gigabytes(measured['peak_memory'])} at most"
    return rows


def _number(text: str, pattern: str) -> int | None:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1]) if found else None


def _memory(adb: Adb, name: str) -> int:
    """Bytes of one of the kernel's figures."""
    found = _number(adb.shell("cat /proc/meminfo"), rf"^{name}:\s+(\d+) kB")
    if found is None:
        raise PhoneError(f"the phone's kernel does not tell {name}")
    return 1024 * found


def _storage(adb: Adb) -> int:
    """Bytes free where the folder is."""
    found = _number(adb.shell(f"df -k {REMOTE}"), r"^\S+\s+\d+\s+\d+\s+(\d+)\s")
    if found is None:
        raise PhoneError("the phone does not tell how much of its storage is free")
    return 1024 * found
