"""Rows are the same whichever layout they lie in, and wherever they come from."""

import gzip
import io
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from common.errors import UserError
from scoring.competition import TASKS
from scoring.competition.data import choose_rows, count_warning, read_rows
from scoring.competition.downloads import Download
from scoring.sample import FOLDER as SAMPLE
from tests.conftest import ROOT
from tests.data.fake_hub import FakeHub

OF_OPENCOMPASS = {
    "commonsense_qa": "commonsenseqa/dev_rand_split.jsonl",
    "bbh_boolean_expressions": "BBH/data/boolean_expressions.json",
    "gsm8k": "gsm8k/test.jsonl",
    "humaneval": "humaneval/human-eval-v2-20210705.jsonl",
    "chid": "FewCLUE/chid/test_public.json",
    "truthfulqa": "TruthfulQA.csv",
}
"""Where OpenCompass keeps the file of a task."""


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("name", OF_OPENCOMPASS)
def test_opencompass_layout_and_packed_files_are_read_too(tmp_path: Path, name: str, packed: bool) -> None:
    content = (SAMPLE / TASKS[name].files[0]).read_bytes()
    path = tmp_path / (OF_OPENCOMPASS[name] + ".gz" * packed)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(content) if packed else content)
    assert read_rows(TASKS[name], tmp_path) == read_rows(TASKS[name], SAMPLE)


def test_published_files_have_the_published_rows(shared: Path) -> None:
    rows = {name: len(read_rows(task, shared / "datasets" / "eval")) for name, task in TASKS.items()}
    assert rows == {name: task.rows for name, task in TASKS.items()}
    assert count_warning(TASKS["gsm8k"], 1_319) is None
    assert count_warning(TASKS["gsm8k"], 8) == "gsm8k has 8 rows where published scores are over 1,319"


def test_a_missing_file_is_named_with_both_ways_to_get_it(tmp_path: Path) -> None:
    expected = (
        f"chid needs {tmp_path}/chid/test_public.json or {tmp_path}/FewCLUE/chid/.* with .gz: put .* leave --data out"
    )
    with pytest.raises(UserError, match=expected):
        read_rows(TASKS["chid"], tmp_path)


def test_truthfulqa_of_2025_is_refused(shared: Path, tmp_path: Path) -> None:
    (tmp_path / "truthfulqa").mkdir()
    later = shared / "datasets" / "eval" / "truthfulqa" / "2025" / "TruthfulQA.csv"
    shutil.copy(later, tmp_path / "truthfulqa" / "TruthfulQA.csv")
    with pytest.raises(
        UserError, match="is TruthfulQA of 2025 with 790 questions, and published scores are over the 817"
    ):
        read_rows(TASKS["truthfulqa"], tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gsm8k", b'{"question": "1?", "answer": "#### 1"}\n{"question":', "is damaged or no file of this task"),
        ("gsm8k", b'{"question": "1?", "answer": "#### 1"}\n{"question": "2?"}', "row 2 of .* is no question of gsm8k"),
        ("gsm8k", b"", "has no rows"),
        ("gsm8k", gzip.compress(b"{}" * 99, mtime=0)[:-9], "cannot be read"),
        ("gsm8k", b"\xff\xfe", "is damaged or no file of this task"),
        (
            "chid",
            b'{"content": "#idiom#", "candidates": ["a", "b"], "answer": 0}',
            "row 1 of .* is no question of chid",
        ),
        ("truthfulqa", b"Question,Best Answer,Correct Answers,Incorrect Answers\nWhy?,So,So,;\n", "without answers"),
        ("bbh_snarks", b"[]", "is damaged or no file of this task"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / TASKS[name].files[0]
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_rows(TASKS[name], tmp_path)


def test_a_limit_draws_the_same_rows_for_the_same_seed() -> None:
    task = TASKS["gsm8k"]
    drawn = choose_rows(task, 1_319, 20, seed=0)
    assert drawn == choose_rows(task, 1_319, 20, seed=0) == sorted(set(drawn))
    assert drawn != choose_rows(task, 1_319, 20, seed=1)
    assert drawn != choose_rows(TASKS["chid"], 1_319, 20, seed=0)
    assert choose_rows(task, 5, None, seed=0) == choose_rows(task, 5, 9, seed=0) == [0, 1, 2, 3, 4]


def test_rows_of_the_hub_are_those_of_the_files(tmp_path: Path) -> None:
    """The hub's own fields, in a stand-in for it; datasets reads its address when it is imported."""
    script = (
        "import json, sys; from scoring.competition import TASKS; from scoring.competition.data import read_rows\n"
        "print(json.dumps({name: read_rows(TASKS[name], None) for name in sys.argv[1:]}))"
    )
    names = [name for name in OF_OPENCOMPASS if name != "chid"]
    with FakeHub(_on_the_hub()) as hub:
        done = subprocess.run(
            [sys.executable, "-c", script, *names, "bbh_boolean_expressions"],
            env=hub.environment(tmp_path) | {"PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    assert json.loads(done.stdout.splitlines()[-1]) == {name: read_rows(TASKS[name], SAMPLE) for name in names}


def _on_the_hub() -> dict[str, dict[str, bytes]]:
    """The sample's rows as the data sets of the hub have theirs."""

    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (SAMPLE / TASKS[name].files[0]).read_text().splitlines()]

    asked = [
        {
            "question": record["question"]["stem"],
            "choices": {key: [choice[key] for choice in record["question"]["choices"]] for key in ("label", "text")},
            "answerKey": record["answerKey"],
        }
        for record in lines("commonsense_qa")
    ]
    examples = json.loads((SAMPLE / TASKS["bbh_boolean_expressions"].files[0]).read_text())["examples"]
    return {
        "tau/commonsense_qa": _repo("default", "validation", asked),
        "SaylorTwift/bbh": _repo("boolean_expressions", "test", examples),
        "openai/gsm8k": _repo("main", "test", lines("gsm8k")),
        "openai/openai_humaneval": _repo("openai_humaneval", "test", lines("humaneval")),
        "truthfulqa/truthful_qa": _repo("generation", "validation", read_rows(TASKS["truthfulqa"], SAMPLE)),
    }


def _repo(config: str, split: str, rows: list[dict]) -> dict[str, bytes]:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    path = f"{config}/{split}-00000-of-00001.parquet"
    card = f"---\nconfigs:\n- config_name: {config}\n  data_files:\n  - split: {split}\n    path: {path}\n---\n"
    return {"README.md": card.encode(), path: file.getvalue()}


class _Server(BaseHTTPRequestHandler):
    """Serves CONTENT, and breaks off in the middle of the first answer."""

    content: ClassVar = bytes(range(256)) * 1000
    ranges: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.ranges.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        end = len(self.content) // 2 if len(self.ranges) == 1 else None
        self.wfile.write(self.content[start:end])

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Server) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        _Server.ranges.clear()
        yield f"http://127.0.0.1:{server.server_port}/chid.json"
        server.shutdown()


def test_a_download_that_broke_off_goes_on_where_it_was(tmp_path: Path, monkeypatch, address: str) -> None:
    import hashlib

    monkeypatch.setenv("PALMTOP_CACHE", str(tmp_path))
    file = Download(address, "sets/chid.json", hashlib.sha256(_Server.content).hexdigest())
    with pytest.raises(UserError, match="it broke off 128,000 bytes before its end.* run the same command again"):
        file.fetch()
    assert file.fetch().read_bytes() == _Server.content
    assert file.fetch() == tmp_path / "sets" / "chid.json"
    assert _Server.ranges == [None, "bytes=128000-"]
    with pytest.raises(UserError, match=f"has sha256 .* where {'0' * 64} was published; put it at"):
        Download(address, "sets/other.json", "0" * 64).fetch()


def test_a_file_that_cannot_be_fetched_says_what_to_do(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PALMTOP_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=f"cannot be fetched .* put the file at {tmp_path}/a.json, or give .* --data DIR"
    ):
        Download("http://127.0.0.1:9/a.json", "a.json", "0" * 64).fetch()
