"""The page of a run: whole, escaped, without requests, at every stage of a run's life."""

import json
import re
import shlex
import subprocess
import sys
import threading
import urllib.request
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import write_json
from common.settings import Count, parse
from scoring.score import empty_score
from scoring.settings import ScoreSettings
from submit.report import report, report_command, score_command
from submit.rules import judge
from submit.run import Run, lineage
from submit.serve import make_server
from submit.settings import ReportCommand
from tests.conftest import ROOT, run_command
from tests.submit.browser import CHROMIUM, look
from tests.submit.runs import C4, FOREIGN, write_model, write_phone, write_run, write_scores

GOOD = (50.0, 40.0, 30.0, None, 40.0, 18.0)
VOID = {"meta", "link", "br", "line", "path", "circle", "rect"}


class Reader(HTMLParser):
    """Checks that elements nest, and collects what a page holds."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attributes if name in ("src", "href", "action", "data")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in VOID or (tag not in ("meta", "link", "br") and not self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def words(self) -> str:
        """The text, one space between words."""
        return " ".join(self.text.split())

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "


def read(page: str) -> Reader:
    """A page, checked."""
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "script" not in reader.tags
    assert all(address.startswith(("#", "data:")) for address in reader.addresses)
    return reader


@pytest.fixture
def path_of_runs(tmp_path: Path) -> Path:
    """Pre-training, fine-tuning, a cut and its recovery, as a recipe lays them out; returns the last run."""
    top = tmp_path / "runs" / "demo"
    first = write_run(top / "pretrain")
    second = write_run(top / "sft", parent=first / "model")
    write_scores(second, GOOD, name="sample", marks=("sample: a few items",))
    cut = write_model(top / "prune" / "cut", data=C4, stage="prune", parent=str(second / "model"))
    stage = {
        "name": "before", "folder": "x", "parameters": 100, "file_bytes": 400, "scores": {"gsm8k": 2.5},
        "shape": {"layers": 2, "ffn": 64, "heads": 2, "kv_heads": 1, "vocab": 512},
        "phone": {"weights": 200, "cache": 10, "context": 64, "decode_ceiling": 5.0, "total": 3,
                  "passes_opencl_gate": True},
        "losses": [{"source": "c4 <b>", "perplexity": 20.0, "bits_per_byte": 1.0}],
    }  # fmt: skip
    after = {**stage, "name": "after", "parameters": 80, "scores": {"gsm8k": None}}
    last = write_run(top / "prune" / "recovered", parent=cut, teacher=second / "model")
    write_json(cut / "pruning.json", {"method": "energy", "repair": True, "stages": [stage]})
    write_json(last / "model" / "pruning.json", {"stages": [stage, after]})
    spread = {"median": 120.5, "lower": 110.0, "upper": 130.0}
    measured = [{"engine": "ours", "threads": 2, "peak_memory": 10**8, "prompts": [
        {"tokens": 64, "prefill": spread, "decode": spread, "first_token": spread},
    ]}]  # fmt: skip
    write_json(last / "export" / "bench.json", {"processor": "a CPU, 2 cores", "measurements": measured})
    write_json(last / "export" / "export.json", {"parity": {"summary": "KL 1e-6"}, "command": "python -m export MODEL"})
    return last


def test_the_last_run_shows_the_whole_path(path_of_runs: Path) -> None:
    report_command(ReportCommand(str(path_of_runs)))
    found = read((path_of_runs / "report.html").read_text(encoding="utf-8"))
    words = found.words()
    for said in (
        "Pre-training demo/pretrain → Fine-tuning demo/sft → Pruning cut → Recovery demo/prune/recovered",
        "30,000 tokens in 30 steps of 40,000 tokens (75%), 1m 00s of training; 1 step skipped, 1 restart.",
        "went on after step 20",
        "step 7 skipped",
        "<script>alert(20)</script> 中文",
        "Who <b>?",
        "Cut by energy, with repair.",
        "perplexity, c4 <b> 20 20",
        "gsm8k 2.50 not run",
        "parameters 100 80 -20.0%",
        "a CPU, 2 cores palmtop's library, 2 threads 64 120.5 110.0 to 130.0",
        "Not measured on a phone.",
        "The exported library against transformers: KL 1e-6.",
        "not run",
        "Cauchy-3B-preview (Tinytron) Tinytron's README 22.52",
        "data within the rules of track 2",
        "python -m scoring",
        "--max-out-len 64 --suite competition",
        "python -m export MODEL",
    ):
        assert said in words, said
    assert "Content-Security-Policy" in report(Run(path_of_runs))


def test_a_run_that_has_just_begun_and_one_without_anything(tmp_path: Path) -> None:
    run = write_run(tmp_path / "young", steps=1, model=False)
    assert "1,000 tokens in 1 step of 40,000 tokens (2%)" in read(report(Run(run))).text
    for name in ("metrics.jsonl", "samples.jsonl", "env.json"):
        (run / name).unlink()
    assert "No step has been taken yet." in read(report(Run(run))).text


def test_every_prefix_of_the_metrics_gives_a_page(tmp_path: Path) -> None:
    """A running job may have written any number of bytes."""
    run = write_run(tmp_path / "run")
    whole = (run / "metrics.jsonl").read_bytes()
    for end in range(0, len(whole), 499):
        (run / "metrics.jsonl").write_bytes(whole[:end])
        read(report(Run(run)))


def test_a_phone_counts_and_an_emulator_does_not(tmp_path: Path) -> None:
    run = write_scores(write_run(tmp_path / "run"), GOOD)
    write_phone(run, 33.0)
    words = read(report(Run(run))).words()
    assert "decode, tok/s 33.0 Palmtop Phone 9, palmtop f16, 4 threads" in words
    assert "measured on Palmtop Phone 9: 1 GB" in words
    assert "Not measured on a phone" not in words
    write_phone(run, 33.0, emulated=True)
    words = read(report(Run(run))).words()
    assert "phone.json is of an emulator, whose speed means nothing" in words
    assert "33.0" not in words


def test_what_a_score_lacks_stands_beside_it(tmp_path: Path) -> None:
    run = write_scores(write_run(tmp_path / "run"), GOOD)
    words = read(report(Run(run))).words()
    assert "geometric mean none incomplete" in words
    assert "run competition incomplete chat 50.00" in words
    assert "incomplete: no score of humaneval. 0 to 100" in words
    (run / "model" / "model.safetensors").write_bytes(b"of a later step")
    words = read(report(Run(run))).words()
    assert "geometric mean none" not in words
    assert "run competition stale incomplete chat 50.00" in words
    assert "stale: the run's model has other weights now. 0 to 100" in words
    assert "a CPU, 2 threads" not in words  # its speed is not the model's either


def test_parents_are_found_from_elsewhere_and_circles_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = write_run(tmp_path / "work" / "runs" / "first")
    second = write_run(tmp_path / "work" / "runs" / "second", parent=Path("runs/first/model"))
    monkeypatch.chdir("/")
    assert [one.name for one in lineage(Run(second))] == ["first", "second"]
    circle = write_run(tmp_path / "work" / "runs" / "circle", parent=Path("runs/circle/model"))
    assert [one.name for one in lineage(Run(circle))] == ["circle"]
    lost = write_run(tmp_path / "lost", parent=Path("nowhere/model"))
    assert [one.name for one in lineage(Run(lost))] == ["lost"]
    assert Run(first / "model").path == first


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it has no config.yaml"):
        report_command(ReportCommand(str(tmp_path)))
    run = write_scores(write_run(tmp_path / "run"), GOOD)
    (run / "scores" / "competition" / "score.json").write_text("{")
    with pytest.raises(UserError, match=r"score.json cannot be read: .*put it right, or remove it"):
        report_command(ReportCommand(str(run)))
    assert not (run / "report.html").exists()


def test_the_data_of_a_track() -> None:
    alpaca = {"stage": "sft", "sources": [{"source": "tatsu-lab/alpaca", "weight": 1}]}
    made = "forms.jsonl (made of silk-road/alpaca-data-gpt4-chinese, tatsu-lab/alpaca)"

    def verdict(*data: dict) -> str:
        found = judge(data)
        assert found is not None
        return found.text

    def sft(source: str) -> dict:
        return {"stage": "sft", "sources": [{"source": source}]}

    assert verdict(*C4, alpaca, sft(made)) == "data within the rules of track 2"
    assert verdict(*C4, sft("other/set")) == "data outside the rules of track 2: other/set"
    assert verdict(*C4, sft("mine.json")) == "data that nobody can vouch for: mine.json"
    assert verdict(*FOREIGN, *C4) == "data within the rules of track 1"
    assert verdict(*FOREIGN, *C4, alpaca) == "data outside the rules of track 1: tatsu-lab/alpaca"
    assert judge([]) is None


@pytest.mark.parametrize(
    "settings",
    [
        ScoreSettings(),
        ScoreSettings(form="base", data="my data", limit=50, speed=False),
        ScoreSettings(suite="quick,c4", text_tokens=Count(5000), early_stop=False),
    ],
)
def test_the_command_of_a_score_asks_for_the_same_again(settings: ScoreSettings, tmp_path: Path) -> None:
    model = write_model(tmp_path / "a run" / "model", data=C4)
    found = empty_score(model, settings, "chat" if settings.form == "auto" else settings.form)
    found.write(tmp_path)
    words = shlex.split(score_command(json.loads((tmp_path / "score.json").read_text())))
    assert words[:4] == ["python", "-m", "scoring", str(model)]
    assert parse(ScoreSettings, words[4:], prog="", description="") == settings


def test_a_running_job_is_watched(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=10, model=False)
    server = make_server(run, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    try:
        page = unescape(urllib.request.urlopen(address).read().decode())
        assert "10,000 tokens in 10 steps" in page
        assert "connect-src 'self'" in page
        with open(run / "metrics.jsonl", "w", encoding="utf-8") as file:
            file.write(json.dumps({"step": 11, "tokens": 11_000, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0}) + "\n")
        assert "11,000 tokens in 11 steps" in urllib.request.urlopen(address).read().decode()
        if CHROMIUM:
            (seen,) = look(address, [(1280, False)])
            assert (seen.messages, seen.requests) == ([], [])
        (run / "env.json").write_text("{")
        with pytest.raises(urllib.request.HTTPError, match="503"):
            urllib.request.urlopen(address)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_taken_port_is_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=1)
    with make_server(run, "127.0.0.1", 0) as server, pytest.raises(UserError, match="cannot be listened on"):
        report_command(ReportCommand(str(run), serve=True, port=server.server_port))


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_shows_it(path_of_runs: Path) -> None:
    report_command(ReportCommand(str(path_of_runs)))
    windows = [(1280, False), (390, True)]
    for seen, (_, dark) in zip(look((path_of_runs / "report.html").as_uri(), windows), windows, strict=True):
        assert (seen.messages, seen.requests) == ([], [])
        assert seen.overflow == 0
        red = int(re.findall(r"\d+", seen.background)[0])
        assert red < 40 if dark else red > 215


def test_the_command_and_its_help(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['submit', 'report', '--help']\n"
        "from submit.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: print('torch' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python -m submit report runs/demo" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert run_command("-m", "submit").stdout.startswith("python -m submit report RUN")
    for words, said in (
        (["nonsense"], "error: python -m submit nonsense is no command; there are report, leaderboard and bundle\n"),
        (["report"], "error: give the run folder: python -m submit report runs/NAME\n"),
        (["report", "x", "--port", "70000"], "error: --port must be from 0 to 65535, not 70000\n"),
        (["report", "x", "--serve", "--out", "y"], "error: --serve writes no file; leave --out out\n"),
    ):
        done = run_command("-m", "submit", *words)
        assert (done.returncode, done.stderr) == (2, said)
