"""``--slurm`` without a cluster: the script that is filled in, the copy of the code, and what is refused.

tests/slurm has the same on a real one.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common import signals
from common.errors import UserError
from tests.conftest import ROOT, run_command
from train.__main__ import main
from train.slurm import Request, requeue, seconds
from train.snapshot import take_snapshot
from train.submit import TEMPLATE, Script

SBATCH = """#!/bin/sh
echo "$@" > {folder}/asked
{answer}
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to submit from, where SLURM takes every job."""
    install(tmp_path, "sbatch", "echo '42;here'")
    install(tmp_path, "squeue", "true")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def install(folder: Path, name: str, answer: str) -> None:
    """Put a program on the path of ``site``."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(SBATCH.format(folder=folder, answer=answer))
    (folder / "bin" / name).chmod(0o755)


def train(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *words])
    try:
        main()
    finally:
        signals.clear()


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as caught:
        train(monkeypatch, *words)
    assert caught.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_a_request_is_read_and_written_back() -> None:
    text = "nodes=4,gpus=8,time=1-12:00,partition=a,b,mem=500G,signal=600"
    request = Request.parse(text)
    assert str(request) == text
    assert request.options() == {
        "nodes": "4",
        "gpus-per-node": "8",
        "ntasks-per-node": "8",
        "time": "1-12:00",
        "partition": "a,b",
        "mem": "500G",
        "signal": "USR1@600",
    }
    without = Request.parse("gpus=0,tasks=2").options()
    assert without == {"gpus-per-node": None, "ntasks-per-node": "2"}


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("5", 300), ("5:30", 330), ("1:00:30", 3630), ("2-1", 176_400), ("2-1:30", 178_200), ("1-0:0:1", 86_401)],
)
def test_time_limits_are_read_as_slurm_reads_them(limit: str, expected: int) -> None:
    assert seconds(limit) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nodes=4,gpu=8", "'gpu=8' is none of nodes=, gpus=, tasks=, cpus=, time="),
        ("4", "'4' is none of nodes="),
        ("nodes=0", "'nodes=0' is nothing that SLURM takes"),
        ("nodes=4,gpus", "'nodes=4,gpus' is nothing that"),
        ("time=1:2:3:4", "'time=1:2:3:4' is nothing that"),
        ("partition=a b", "'partition=a b' is nothing that"),
        ("nodes=1,nodes=2", "nodes= stands twice"),
        ("gpus=0", "needs tasks=N"),
    ],
)
def test_a_request_that_is_none_is_explained(text: str, message: str, monkeypatch, capsys) -> None:
    assert message in refused(monkeypatch, capsys, "--slurm", text)


def test_the_script_is_filled_in_and_submitted(site: Path, monkeypatch, capsys) -> None:
    words = ["--size", "tiny", "--data", "my corpus", "--eval.prompts", '["It\'s"]', "--run", "one"]
    train(monkeypatch, *words[:4], "--slurm=nodes=2,gpus=4,account=abc", *words[4:])
    run = site / "runs" / "one"
    assert (site / "asked").read_text() == "--parsable runs/one/submit.sbatch\n"
    script = Script((run / "submit.sbatch").read_text())
    assert script.world_size == 8
    assert script.options == Script(TEMPLATE.read_text()).options | {
        "job-name": "one",
        "nodes": "2",
        "gpus-per-node": "4",
        "ntasks-per-node": "4",
        "account": "abc",
        "output": f"{run}/slurm-%j.log",
        "chdir": str(site),
    }
    set_here = [line for line in script.text.splitlines() if line.startswith(("words=", "python=", "code="))]
    shown = "\n".join([*set_here, 'printf "%s\\n" "${words[@]}" "$python" "$code"'])
    printed = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.splitlines()
    assert printed == [*words, sys.executable, str(run / "code")]
    assert script.text.endswith("# Submitted as job 42.\n")
    said = capsys.readouterr().out
    assert "job 42: the run runs/one on 2 nodes × 4 processes" in said
    assert "scancel --signal=USR1 42" in said


def test_options_of_a_cluster_stand_in_the_script(tmp_path: Path) -> None:
    script = Script("#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --gpus-per-node=8\n#SBATCH --account=ours\nrun\n")
    assert script.with_options({"nodes": "2", "gpus-per-node": None, "output": "/a b/log"}).text == (
        "#!/bin/bash\n#SBATCH --nodes=2\n#SBATCH --account=ours\n#SBATCH --output='/a b/log'\nrun\n"
    )
    with pytest.raises(UserError, match="must set words="):
        script.with_variables({"words": "()"})


def test_a_run_without_a_name_gets_one_of_its_own(site: Path, monkeypatch) -> None:
    train(monkeypatch, "--size", "tiny", "--slurm", "gpus=1")
    (run,) = (site / "runs").iterdir()
    assert run.name.startswith("tiny-")
    assert f"--run {run.name})" in (run / "submit.sbatch").read_text()


def test_what_cannot_work_is_not_submitted(site: Path, monkeypatch, capsys) -> None:
    def error(*words: str) -> str:
        message = refused(monkeypatch, capsys, "--size", "tiny", "--run", "one", *words)
        assert not (site / "asked").exists()
        assert not (site / "runs").exists()
        return message

    uneven = ("--batch-tokens", "5120", "--seq-len", "512", "--slurm")
    assert "10 rows of 512, which 4 devices cannot share evenly" in error(*uneven, "nodes=2,gpus=2")
    assert "a time limit of 5 leaves no time to train: SIGUSR1 comes 300 s before" in error("--slurm", "time=5")
    assert "leave --devices out" in error("--devices", "2", "--slurm", "gpus=2")
    (site / "slurm.yaml").write_text("slurm: gpus=2\n")
    assert "not into the file of --config" in error("--config", str(site / "slurm.yaml"))


def test_an_existing_run_is_checked_with_its_own_batch(site: Path, monkeypatch, capsys) -> None:
    run = site / "runs" / "one"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("batch_tokens: 5120\nseq_len: 512\nloader:\n  streams: 40\n")
    words = ("--size", "tiny", "--run", "one", "--slurm")
    assert "which 4 devices cannot share" in refused(monkeypatch, capsys, *words, "nodes=2,gpus=2")
    train(monkeypatch, *words, "nodes=5,gpus=2")
    (run / "config.yaml").write_text("batch_tokens: 5120\nseq_len: 512\nloader:\n  streams: 64\n")
    assert "64 streams cannot be shared evenly by 10" in refused(monkeypatch, capsys, *words, "nodes=5,gpus=2")


def test_without_slurm_it_says_so(site: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/usr/bin/nowhere")
    assert "needs sbatch on the PATH" in refused(monkeypatch, capsys, "--size", "tiny", "--slurm", "gpus=1")


def test_what_slurm_refuses_leaves_nothing(site: Path, monkeypatch, capsys) -> None:
    answer = "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1"
    install(site, "sbatch", answer)
    message = refused(monkeypatch, capsys, "--size", "tiny", "--run", "one", "--slurm", "gpus=1")
    assert message == "error: Batch job submission failed: Invalid account"
    assert not (site / "runs" / "one").exists()


def test_one_run_has_one_job(site: Path, monkeypatch, capsys) -> None:
    words = ("--size", "tiny", "--run", "one", "--slurm", "gpus=1")
    train(monkeypatch, *words)
    install(site, "squeue", "echo 42 gpu one me PD")
    assert "job 42 of the run runs/one waits in the queue or runs" in refused(monkeypatch, capsys, *words)
    install(site, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    train(monkeypatch, *words)


def test_submitting_imports_nothing_heavy() -> None:
    code = "import train.submit, train.snapshot, sys; print([n for n in ('torch', 'lightning') if n in sys.modules])"
    assert run_command("-c", code).stdout.strip() == "[]"


def test_the_copy_runs_its_own_code_and_knows_its_commit(tmp_path: Path) -> None:
    code = take_snapshot(tmp_path / "run")
    assert not (code / "tests").exists()
    assert (code / "slurm" / "train.sbatch").exists()
    (code / "COMMIT").write_text("abc123-dirty\n")
    show = "import common, data, models, train.submit, common.run_folder as f; print(f.git_commit(), train.__file__)"
    (code / "show.py").write_text(show)
    done = run_command(code / "show.py", folder=ROOT)
    assert done.stdout.split() == ["abc123-dirty", str(code / "train" / "__init__.py")], done.stderr


def test_the_script_works_by_hand(tmp_path: Path) -> None:
    """``sbatch slurm/train.sbatch WORDS``; what srun would start gets SIGUSR1 before its first line."""
    (tmp_path / "srun").write_text('#!/bin/sh\nwhile [ "$1" != env ]; do echo "$1"; shift; done\nexec "$@"\n')
    real = shlex.quote(sys.executable)
    received = "import sys; from common import signals; signals.install(); print(signals.received(), sys.argv[2:])"
    (tmp_path / "python").write_text(
        f'#!/bin/sh\n[ "$1" = -m ] && exec {real} "$@"\nkill -USR1 $$\nexec {real} -c {shlex.quote(received)} "$@"\n'
    )
    for name in ("srun", "python"):
        (tmp_path / name).chmod(0o755)
    words = ["--size", "tiny", "--run", str(tmp_path / "my run")]

    def submit(**variables: str) -> list[str]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "PYTHON": str(tmp_path / "python")} | variables
        command = ["bash", str(TEMPLATE), *words]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    told = ["--cpus-per-task=3", "--kill-on-bad-exit=1", f"{signals.signal.Signals.SIGUSR1!s} {words}"]
    assert submit(SLURM_CPUS_PER_TASK="3") == told
    (tmp_path / "my run" / "code" / "mine").touch()
    submit(SLURM_RESTART_COUNT="1")
    assert (tmp_path / "my run" / "code" / "mine").exists()  # the copy of the first start serves the others
    submit()
    assert not (tmp_path / "my run" / "code" / "mine").exists()


def test_a_signal_after_the_last_save_changes_nothing() -> None:
    """Python gives signals their deadly defaults back while it ends."""
    program = """
import os, signal
import train.rank as rank
from common import signals
from train.launch import Place

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGUSR1):
        kill(process, number)

late = Late()
signals.install()
rank.run_rank(lambda: None, Place("alone", 0, 0, 1, 1))
"""
    assert run_command("-c", program).returncode == 0


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("exit 0", "job 7 is in the queue again"),
        ("echo 'Job is not requeueable' >&2; exit 1", "refuses to requeue job 7: Job is not requeueable. Submit"),
    ],
)
def test_requeueing_says_what_came_of_it(site: Path, answer: str, said: str, capsys) -> None:
    requeue({})
    install(site, "scontrol", answer)
    requeue({"SLURM_JOB_ID": "7"})
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert (site / "asked").read_text() == "requeue 7\n"
