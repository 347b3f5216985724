"""How a command begins and ends."""

import os

import pytest

from common.command import run_command
from common.errors import UserError
from tests import conftest


def test_a_users_error_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("no such thing; use the other")

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; use the other\n"


@pytest.mark.parametrize(("given", "found"), [(None, "1000"), ("7", "7")])
def test_threads_wait_asleep_unless_the_user_says_otherwise(
    given: str | None, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if given is not None:
        monkeypatch.setenv("GOMP_SPINCOUNT", given)
    run_command(lambda: None)
    assert os.environ["GOMP_SPINCOUNT"] == found


DOORS = ("train", "sft", "scoring", "pruning", "export", "submit", "data", "pipeline")


def test_torch_is_not_imported_before_the_setting_is_made() -> None:
    code = f"import sys, {', '.join(f'{door}.__main__' for door in DOORS)}; sys.exit('torch' in sys.modules)"
    assert conftest.run_command("-c", code).returncode == 0
