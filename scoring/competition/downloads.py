"""A published file that is no part of a data set on the hub, fetched once into the cache."""

import urllib.error
import urllib.request
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO

from common.errors import UserError
from common.files import cache_folder, exclusive, readable_disk_errors, sha256

_CHUNK = 2**16
_TIMEOUT_S = 30


@dataclass(frozen=True)
class Download:
    """A file at an address, known by its hash."""

    url: str
    name: str
    """Path inside the cache."""
    sha256: str

    @property
    def path(self) -> Path:
        """Where it is once it has been fetched, and where it may be put by hand."""
        return cache_folder() / self.name

    def fetch(self) -> Path:
        """Have the file in the cache; a download that was cut off goes on where it ended.

        Raises:
            UserError: it cannot be fetched, or is not the file that was published.
        """
        if not self.path.exists():
            with exclusive(self.path.parent, f"{self.path.parent}", keep=True):
                self._download(self.path.with_name(self.path.name + ".part"))
        return self.path

    def _download(self, part: Path) -> None:
        try:
            with readable_disk_errors(part), open(part, "ab") as file:
                self._append(file)
        except (urllib.error.URLError, HTTPException, ConnectionError, TimeoutError) as error:
            raise UserError(
                f"{self.url} cannot be fetched ({error}). What came is kept: run the same command again to go on, or "
                f"put the file at {self.path}, or give a folder of data that has it: --data DIR"
            ) from error
        found = sha256(part)
        if found != self.sha256:
            part.unlink()
            raise UserError(f"{self.url} has sha256 {found} where {self.sha256} was published; put it at {self.path}")
        part.replace(self.path)

    def _append(self, file: BinaryIO) -> None:
        """Fetch what ``file`` lacks; a server that knows no ranges sends all of it again."""
        begun = file.tell()
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={begun}-"} if begun else {})
        try:
            response = urllib.request.urlopen(request, timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code == 416:  # there is nothing after what we have
                return
            raise
        with response:
            if response.status != 206:
                file.truncate(0)
            while chunk := response.read(_CHUNK):
                file.write(chunk)
            if response.length:
                raise ConnectionError(f"it broke off {response.length:,} bytes before its end")
