import re

import pytest

from bench import scaling
from tests.forked import forked
from train.scaling import Link, collective


@pytest.mark.parametrize("operation", scaling.OPERATIONS)
def test_a_link_is_found_from_the_times_of_its_messages(operation) -> None:
    link = Link(latency=2e-4, bandwidth=8e8)
    for world in (2, 4):
        seconds = [collective(operation, size, world, link) for size in scaling.SIZES]
        found = scaling.fit_link(operation, seconds, world)
        assert found.latency == pytest.approx(link.latency, rel=0.35)  # where small ones go as trees no line fits both
        assert found.bandwidth == pytest.approx(link.bandwidth, rel=0.1)
        predicted = [collective(operation, size, world, found) for size in scaling.SIZES]
        assert predicted == pytest.approx(seconds, rel=0.35)


def test_two_processes_are_predicted_and_measured() -> None:
    words = "check --worlds 2 --strategies fsdp --rounds 1 --steps 1 --rows 1 --seq-len 16"
    done = forked().run("bench/scaling.py", *words.split())
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"2 processes: \w+ [\d,]+ µs a message, \d+\.\d\d GB/s", done.stdout)) == 4
    *_, line = done.stdout.splitlines()
    strategy, world, compute, messages, predicted, measured, ratio = line.split()[:7]
    assert (strategy, world) == ("fsdp", "2")
    assert float(compute) + float(messages) == pytest.approx(float(predicted), abs=0.11)
    assert float(ratio) == pytest.approx(float(predicted) / float(measured), abs=0.01)
    assert float(messages) > 0


def test_scaling_on_paper(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = "paper --size 125m --ranks 64 --strategies ddp fsdp --seconds 0.1 --micro-rows 16 --strong 16"
    monkeypatch.setattr("sys.argv", ["scaling.py", *words.split()])
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    tables = [[line.split() for line in lines if re.match(rf"{name} +\d+ ", line)] for name in ("ddp", "fsdp")]
    for rows in tables:
        weak, strong = rows[:7], rows[7:]
        assert [int(row[1]) for row in weak] == [int(row[1]) for row in strong] == [1, 2, 4, 8, 16, 32, 64]
        exposed = [float(row[3]) for row in weak]
        assert exposed == sorted(exposed)
        compute = [float(row[2].replace(",", "")) for row in strong]
        assert compute[0] / compute[-1] == pytest.approx(64, rel=0.3)  # 256 rows are 4 on each of 64
    assert "not" not in lines[1]
