import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import exclusive, gigabytes, new_folder, readable_disk_errors, require_space, turn, write_text


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        (folder / "a").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with new_folder(target) as folder:
        (folder / "a").write_text("one")
    with pytest.raises(RuntimeError), new_folder(target) as folder:
        raise RuntimeError
    assert (target / "a").read_text() == "one"
    with new_folder(target) as folder:
        (folder / "b").write_text("two")
    assert [path.name for path in target.iterdir()] == ["b"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_claimed_folder_that_stays_empty_goes_again(tmp_path: Path) -> None:
    folder = tmp_path / "scores" / "model"
    with pytest.raises(UserError, match="refused"), exclusive(folder, "it"):
        raise UserError("refused")
    assert not (tmp_path / "scores").exists()
    with pytest.raises(UserError, match="refused"), exclusive(folder, "it"):
        (folder / "answers.jsonl").touch()
        raise UserError("refused")
    (folder / "answers.jsonl").unlink()
    with pytest.raises(UserError, match="refused"), exclusive(folder, "it"):
        raise UserError("refused")
    assert folder.exists()  # it was there before


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("mine")
    with pytest.raises(UserError, match="plain is a file; give the name of a folder"), new_folder(tmp_path / "plain"):
        pass
    assert (tmp_path / "plain").read_text() == "mine"


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path) -> None:
    target = tmp_path / "made"
    with new_folder(target) as folder:
        (folder / "a").write_text("one")
    target.rename(tmp_path / ".made.old")  # where a kill at the worst moment leaves it
    with pytest.raises(RuntimeError), new_folder(target):
        raise RuntimeError
    assert (target / "a").read_text() == "one"


def test_the_folder_that_one_stands_in_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with new_folder(Path()) as folder:
        (folder / "a").touch()
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["a"]


def test_a_cache_is_filled_by_one_process_at_a_time(tmp_path: Path) -> None:
    seen: list[bool] = []

    def fill() -> None:
        with turn(tmp_path / "cache"):
            seen.append((tmp_path / "cache").exists())
            if not seen[-1]:
                with new_folder(tmp_path / "cache"):
                    time.sleep(0.05)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(fill) for _ in range(4)]:
            done.result()
    assert seen == [False, True, True, True]


def test_a_path_below_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with pytest.raises(UserError, match="cannot be written"):
        write_text(tmp_path / "plain" / "file", "text")


def test_text_is_replaced_in_one_step(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "file", "one")
    write_text(tmp_path / "deep" / "file", "two")
    assert (tmp_path / "deep" / "file").read_text() == "two"
    assert len(list((tmp_path / "deep").iterdir())) == 1


def test_lack_of_room_is_said_with_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"needs 1e\+03 TB|needs .*TB"):
        require_space(tmp_path / "not" / "yet", 10**15, "the run")


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "disk is full"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot")],
)
def test_errors_of_the_disk_name_the_file(number: int, message: str) -> None:
    with pytest.raises(UserError, match=message), readable_disk_errors(Path("/some/file")):
        raise OSError(number, os.strerror(number))


def test_bytes_for_people() -> None:
    assert [gigabytes(count) for count in (12, 3_400, 2_500_000, 7.25e9)] == ["12 B", "3.4 kB", "2.5 MB", "7.25 GB"]
