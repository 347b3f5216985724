"""Measuring a phone, with a stand-in for adb and an emulated phone behind it."""

import json
import shutil
from pathlib import Path

import pytest

from export import phone
from tests.conftest import Command
from tests.export.fake_adb import PROPERTIES, Phone

REAL = {name: value for name, value in PROPERTIES.items() if name != "ro.kernel.qemu"}

ANSWER = {
    "library": "fhm",
    "context": 64,
    "threads": 4,
    "load_seconds": 0.5,
    "arm": True,
    "runs": [{"tokens": 8, "prefill": [80.0, 100.0, 90.0], "decode": [9.0], "first_token": [0.1, 0.08, 0.09]}],
    "peak_memory": 5_000_000,
}


@pytest.fixture
def device(tmp_path: Path) -> Phone:
    return Phone(tmp_path / "device")


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What an exported folder and the runner's look like, without their contents."""
    folder = tmp_path / "export"
    names = [
        "lib/android-cpu-1-armv8.so",
        "lib/android-cpu-2-fhm.so",
        "mlc/params_shard_0.bin",
        "mlc/tensor-cache.json",
    ]
    runner = ["runner/runner", "runner/ld-linux-aarch64.so.1"]
    for name in names + runner:
        file = (tmp_path if name in runner else folder) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"contents of {name}")
    libraries = [{"target": "android-cpu", "file": name} for name in names[:2]]
    memory = {"weights": 1000, "cache": 1000}
    record = {"libraries": libraries, "memory": memory, "dtype": "f16", "model": {"architecture": "LlamaForCausalLM"}}
    (folder / "export.json").write_text(json.dumps(record))
    monkeypatch.setattr(phone, "runner_folder", lambda: tmp_path / "runner")
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    return folder


@pytest.fixture
def measure(device: Phone, exported: Path, exporting: Command):
    """Runs the command: its exit code, output and error."""

    def run(*words: str | Path, adb: str | Path = device.adb) -> tuple[int, str, str]:
        return exporting("phone", exported, "--adb", adb, *words)

    return run


def test_a_phone_is_measured_and_described(device: Phone, exported: Path, measure) -> None:
    device.behave(properties=REAL, answer=f"prompt of 8 tokens, run 1 of 3\n{json.dumps(ANSWER)}")
    code, out, err = measure("--threads", "3")
    assert (code, err) == (0, "")
    assert "prompt of 8 tokens, run 1 of 3" in out
    assert "warning: the phone's screen is off" in out
    assert "prefill 90.0 (85.0-95.0) tok/s, decode 9.0 (9.0-9.0) tok/s, first token after 90 ms" in " ".join(
        out.split()
    )
    found = json.loads((exported / "phone.json").read_text())
    assert not found["emulated"]
    assert found["measurement"]["prompts"][0]["prefill"] == {"median": 90.0, "lower": 85.0, "upper": 95.0}
    assert found["device"]["model"] == "Palmtop Stand-in"
    assert found["device"]["soc"] == "QEMU user"
    assert found["before"] == {
        "battery_percent": 83,
        "battery_celsius": 31.4,
        "charging": True,
        "thermal_status": 0,
        "celsius": {"CPU0": 41.5, "skin": 33.0},
        "awake": False,
    }
    assert device.files() == {
        *("armv8.so", "fhm.so", "ld-linux-aarch64.so.1", "runner"),
        *("weights/params_shard_0.bin", "weights/tensor-cache.json"),
    }


@pytest.mark.parametrize(("properties", "arm"), [(PROPERTIES, True), (REAL, False)])
def test_an_emulated_phone_gives_no_throughput(device: Phone, exported: Path, measure, properties, arm) -> None:
    device.behave(properties=properties, answer=json.dumps(ANSWER | {"arm": arm}))
    code, out, err = measure()
    assert code == 3
    assert "not measured: Palmtop Stand-in is emulated" in err
    assert "tok/s" not in out
    found = json.loads((exported / "phone.json").read_text())
    assert found["emulated"]
    assert found["measurement"] is None
    assert found["load_seconds"] is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"devices": {}}, "no device is connected"),
        ({"devices": {"A": "unauthorized"}}, "the phone A has not been authorised: unlock it"),
        ({"devices": {"A": "offline"}}, "the phone A is offline"),
        ({"devices": {"A": "no permissions (user in plugdev group)"}}, "needs a udev rule"),
        ({"devices": {"A": "recovery"}}, "the phone A is in the state recovery"),
        ({"fault": "no-server"}, "adb does not start: * daemon not running"),
        ({"properties": PROPERTIES | {"ro.product.cpu.abilist": "x86_64,x86"}}, "runs x86_64, x86, and the library is"),
        ({"memory_kb": 1000}, "the phone has 1.02 MB of memory free, and the model needs 315 MB"),
        ({"storage_kb": 1000}, "the phone has 1.02 MB of storage free, and 105 MB are needed"),
        ({"fault": "full"}, "the phone's storage is full while ld-linux-aarch64.so.1 is copied"),
        ({"fault": "damaged"}, "weights/tensor-cache.json arrived damaged"),
        ({"fault": "unplugged"}, "does not answer (error: device 'EMU5554' not found)"),
        ({"fault": "killed"}, "the phone killed the program, as it does when its memory runs out"),
        ({"answer": ""}, "the runner ended without a result"),
    ],
)
def test_what_keeps_a_phone_from_being_measured(device: Phone, exported: Path, measure, changes, reason: str) -> None:
    device.behave(**changes)
    code, _, err = measure()
    assert code == 3
    assert err.startswith("not measured: ")
    assert reason in err
    assert not (exported / "phone.json").exists()


def test_without_adb_nothing_is_measured(measure) -> None:
    code, _, err = measure(adb="no-such-adb")
    assert code == 3
    assert "there is no no-such-adb (Debian: apt install adb)" in err


def test_one_of_several_phones_must_be_named(device: Phone, measure) -> None:
    device.behave(devices={"A": "device", "B": "device"}, answer=json.dumps(ANSWER), properties=REAL)
    assert measure()[::2] == (2, "error: several devices are connected: A, B; choose one with --serial\n")
    assert measure("--serial", "B")[0] == 0
    code, _, err = measure("--serial", "C")
    assert code == 3
    assert "no device C is connected; adb lists A, B" in err


def test_a_push_goes_on_where_it_was_interrupted(device: Phone, exported: Path, measure) -> None:
    answer = {"answer": json.dumps(ANSWER), "properties": REAL}
    device.behave(fault="interrupted", **answer)
    assert measure()[0] == 3
    assert "params_shard_0.bin" not in device.pushed()
    device.behave(**answer)
    assert measure()[0] == 0
    assert device.pushed() == ["tensor-cache.json", "params_shard_0.bin"]
    assert measure()[0] == 0
    assert device.pushed() == []


def test_what_another_model_left_on_the_phone_is_removed(device: Phone, exported: Path, measure) -> None:
    device.behave(answer=json.dumps(ANSWER), properties=REAL)
    shutil.copy(exported / "mlc" / "params_shard_0.bin", exported / "mlc" / "params_shard_1.bin")
    assert measure()[0] == 0
    (exported / "mlc" / "params_shard_1.bin").unlink()
    (exported / "mlc" / "params_shard_0.bin").write_text("other weights")
    device.pushed()
    assert measure()[0] == 0
    assert device.pushed() == ["params_shard_0.bin"]
    assert "weights/params_shard_1.bin" not in device.files()


def test_a_folder_without_a_library_for_phones_is_refused(exported: Path, measure) -> None:
    record = json.loads((exported / "export.json").read_text())
    (exported / "export.json").write_text(json.dumps(record | {"libraries": []}))
    code, _, err = measure()
    assert code == 2
    assert "export the model again with --target host,android-cpu" in err
    (exported / "export.json").unlink()
    code, out, err = measure()
    assert (code, out) == (2, "")
    assert "is no exported folder" in err
