"""A phone over Android's debug bridge: find it, ask it, push files, run programs. See :class:`Adb`."""

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from common.errors import UserError

SECONDS = 120
"""After which a question that a phone answers at once is given up."""

_STATES = {
    "unauthorized": "has not been authorised: unlock it and accept this computer in the dialog it shows",
    "offline": "is offline: plug it in again, or run adb reconnect",
    "no permissions": "may not be opened by this user: Linux needs a udev rule for it (Debian: android-sdk-platform-"
    "tools-common) and to plug it in again",
}
"""What ``adb devices`` may list instead of ``device``, and the way out."""


class PhoneError(Exception):
    """Why there is no measurement on a phone; the message says what to do about it."""


class Adb:
    """One phone.

    Args:
        program: path of adb.
        serial: of the phone.
    """

    def __init__(self, program: str, serial: str) -> None:
        self._program = program
        self.serial = serial

    def shell(self, command: str) -> str:
        """What a command prints on the phone.

        Raises:
            PhoneError: it fails, or the phone is gone.
        """
        done = _adb([self._program, "-s", self.serial, "shell", command])
        self._check(done.returncode, done.stderr or done.stdout)
        return done.stdout

    def lines(self, command: str) -> Iterator[str]:
        """Run a command on the phone and give what it prints, errors included, line by line as it comes.

        Raises:
            PhoneError: it fails or is killed, or the phone is gone.
        """
        words = [self._program, "-s", self.serial, "shell", f"{{ {command}; }} 2>&1"]
        said: list[str] = []
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            try:
                for line in process.stdout:
                    said.append(line.rstrip())
                    yield said[-1]
            except BaseException:
                process.kill()
                raise
        self._check(process.returncode, "\n".join(said[-5:]))

    def push(self, file: Path, remote: str) -> None:
        """Copy a file to the phone.

        Raises:
            PhoneError: the phone is full or gone.
        """
        # No limit on the time: how long a gigabyte takes is the cable's affair.
        done = _adb([self._program, "-s", self.serial, "push", str(file), remote], seconds=None)
        said = f"{done.stdout}\n{done.stderr}"
        if "No space left on device" in said:
            raise PhoneError(f"the phone's storage is full while {file.name} is copied; free some and run again")
        self._check(done.returncode, done.stderr or done.stdout)

    def _check(self, code: int, said: str) -> None:
        """Raise what a program's exit code and words mean, where it failed."""
        if code == 0:
            return
        for line in said.splitlines():
            if line.startswith(("error:", "adb:")):
                raise PhoneError(f"the phone {self.serial} does not answer ({line}); plug it in again")
        if code == 137:  # 128 + SIGKILL
            raise PhoneError(
                "the phone killed the program, as it does when its memory runs out; "
                "close apps, or take a smaller model or --context"
            )
        if code == 132:  # 128 + SIGILL
            raise PhoneError("the phone's processor does not know an instruction of the library: a fault of ours")
        raise PhoneError(f"the phone says: {said.strip() or f'exit code {code}'}")


def connect(program: str, serial: str | None) -> Adb:
    """The phone that is connected, or the one of several that ``serial`` or ``$ANDROID_SERIAL`` names.

    Raises:
        PhoneError: there is no adb, or no phone that answers.
        UserError: there are several, and none is named.
    """
    path = shutil.which(program)
    if path is None:
        raise PhoneError(f"there is no {program} (Debian: apt install adb); --adb takes its path")
    listed = devices(path)
    serial = serial or os.environ.get("ANDROID_SERIAL")
    if serial is not None and serial not in listed:
        raise PhoneError(f"no device {serial} is connected; adb lists {', '.join(listed) or 'none'}")
    ready = [name for name, state in listed.items() if state == "device"]
    if serial is None and len(ready) > 1:
        raise UserError(f"several devices are connected: {', '.join(ready)}; choose one with --serial")
    if not listed:
        raise PhoneError("no device is connected: connect a phone by USB and switch on USB debugging")
    chosen = serial or (ready or list(listed))[0]
    if listed[chosen] != "device":
        known = [text for state, text in _STATES.items() if listed[chosen].startswith(state)]
        raise PhoneError(f"the phone {chosen} {known[0] if known else f'is in the state {listed[chosen]}'}")
    return Adb(path, chosen)


def devices(program: str) -> dict[str, str]:
    """The devices that adb lists, by serial number, with the state of each."""
    done = _adb([program, "devices"])
    if done.returncode:
        raise PhoneError(f"adb does not start: {done.stderr.strip() or done.stdout.strip()}")
    rows = [line.split("\t", 1) for line in done.stdout.splitlines() if "\t" in line]
    return {serial: state.strip() for serial, state in rows}


def _adb(words: list[str], seconds: float | None = SECONDS) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(words, capture_output=True, text=True, errors="replace", timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        raise PhoneError(f"{shlex.join(words)} has no answer after {SECONDS} s; plug the phone in again") from error
    except OSError as error:
        raise PhoneError(f"{words[0]} cannot be run: {error.strerror}") from error
