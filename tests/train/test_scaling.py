"""Prices of messages, and a step on many devices, by hand."""

import math
from dataclasses import replace

import pytest

from models import budget
from models.gpus import GPUS
from models.sizes import size
from train.plan import Machine, Workload
from train.scaling import (
    Compute,
    Link,
    Message,
    Network,
    Reading,
    Saving,
    Unit,
    collective,
    elapsed,
    exchange,
    muon_messages,
    predict,
)

LINK = Link(latency=0.5, bandwidth=10.0)
H100 = GPUS["h100-80g"]


def job(devices: int = 1, nodes: int = 1, *, rows: int = 64, optimizer: str = "adamw", name: str = "125m") -> Workload:
    return Workload(size(name).config, Machine(H100, devices, nodes), rows, 128, "bf16", optimizer)


def sent(units: tuple[Unit, ...], operation: str) -> int:
    messages = [message for unit in units for message in (unit.before, *unit.after) if message is not None]
    return sum(message.size for message in messages if message.operation == operation)


def test_collectives_by_hand() -> None:
    assert collective("all_gather", 80, 4, LINK) == 3 * 0.5 + 80 * 3 / 4 / 10
    assert collective("reduce_scatter", 80, 4, LINK) == collective("all_gather", 80, 4, LINK)
    assert collective("all_reduce", 80, 4, LINK) == 2 * (3 * 0.5 + 6)  # the ring
    assert collective("all_reduce", 8, 64, LINK) == 2 * (6 * 0.5 + 0.8)  # the tree
    assert collective("all_reduce", 80, 1, LINK) == 0


def test_between_nodes_each_device_exchanges_with_its_like() -> None:
    outer = Link(latency=2.0, bandwidth=4.0)
    network = Network(nodes=2, devices=4, inner=LINK, outer=outer)
    within = collective("all_gather", 80, 4, LINK)
    assert network.seconds(Message("all_reduce", 80)) == 2 * within + 2 * (2.0 + 20 / 2 / 4)
    assert network.seconds(Message("all_gather", 80)) == within + 2.0 + 20 / 2 / 4
    assert network.seconds(Message("all_gather", 80, "node")) == within
    assert network.seconds(Message("all_reduce", 80, "nodes")) == 2 * (2.0 + 80 / 2 / 4)
    assert network.seconds(None) == 0


def test_every_parameter_is_sent_as_often_as_the_strategy_does() -> None:
    work = job(8, 4)
    count = budget.parameters(work.config).total
    ddp = exchange(work, "ddp")
    assert (sent(ddp.backward, "all_reduce"), sent(ddp.last_backward, "all_reduce")) == (0, 4 * count)
    assert max(unit.after[0].size for unit in ddp.last_backward) == 25 * 2**20
    fsdp = exchange(work, "fsdp")
    root = work.config.vocab * work.config.width + work.config.width  # tied
    assert sent(fsdp.forward, "all_gather") == 2 * count
    assert sent(fsdp.backward, "all_gather") == 2 * (count - root)
    assert sent(fsdp.backward, "reduce_scatter") == 4 * count
    assert fsdp.backward == fsdp.last_backward
    hsdp = exchange(work, "hsdp")
    assert {unit.before.over for unit in hsdp.forward if unit.before} == {"node"}
    assert sent(hsdp.last_backward, "all_reduce") == pytest.approx(4 * count // 8, abs=work.config.layers)
    assert sent(hsdp.backward, "all_reduce") == 0
    zero = exchange(work, "deepspeed-2")
    assert sent(zero.backward, "reduce_scatter") == 2 * count
    assert zero.at_end[0] == Message("all_gather", 2 * count)
    for one in (ddp, fsdp, hsdp, zero):
        assert sum(unit.share for unit in one.forward) == pytest.approx(1)
        assert sum(unit.share for unit in one.last_backward) == pytest.approx(1)


def test_muon_sends_whole_matrices_or_its_shards() -> None:
    work = job(4, optimizer="muon", name="tiny")
    shapes = {(320, 192): 1, (192, 192): 1, (1024, 192): 1, (192, 512): 1}
    ddp = muon_messages(work, "ddp")
    assert sorted(one.size for one in ddp) == sorted(8 * 2 * rows * columns for rows, columns in shapes)  # 6 among 4: 8
    fsdp = muon_messages(work, "fsdp")
    assert sum(one.size for one in fsdp) == 2 * sum(6 * 2 * rows * columns // 4 for rows, columns in shapes)
    assert muon_messages(job(4), "ddp") == ()
    one = predict(work, "ddp", 16, Compute(1.0, 8.0), Network(1, 4, Link(0, math.inf)))
    assert one.compute == 1.0 + 8.0 / 4  # its work is shared


def test_messages_hide_behind_the_computation_of_others() -> None:
    network = Network(nodes=1, devices=2, inner=Link(0.0, 1.0))  # a gather of 2n bytes takes n seconds
    fetch, cut = Message("all_gather", 2), Message("reduce_scatter", 4)
    blocks = (Unit(0.5, fetch, (cut,)),) * 2
    # Fetched 0 to 1, computed 1 to 5, meanwhile the next fetched; cut up 5 to 7, beside 5 to 9; the last cut 9 to 11.
    assert elapsed(blocks, 8.0, network) == 11.0
    assert elapsed(blocks, 8.0, replace(network, hides=False)) == 8 + 2 * (1 + 2)
    # Where messages take longer, computing waits: fetched 0 to 1 and 1 to 2, cut up 2 to 4 and 4 to 6.
    assert elapsed(blocks, 0.0, network) == 6.0
    assert elapsed((Unit(1.0),), 8.0, network) == 8.0


def test_a_network_without_end_costs_nothing_and_a_slow_one_what_it_takes() -> None:
    compute = Compute(0.3, 0.01)
    alone = predict(job(rows=16), "ddp", 8, compute, Network(1, 1, LINK))
    assert (alone.compute, alone.communication) == (pytest.approx(2 * 0.3 + 0.01), 0)
    work = job(8, 4, rows=16 * 32)
    for strategy in ("ddp", "fsdp", "hsdp", "deepspeed-2", "deepspeed-3"):
        ideal = Network(4, 8, Link(0.0, math.inf), Link(0.0, math.inf))
        assert predict(work, strategy, 8, compute, ideal).communication == pytest.approx(0, abs=1e-12)
        steps = [
            predict(work, strategy, 8, compute, Network(4, 8, Link(5e-6, 3e11), Link(1e-5, rate)))
            for rate in (1e11, 1e10, 1e8)
        ]
        exposed = [step.communication for step in steps]
        assert exposed == sorted(exposed)
        assert exposed[0] < 0.02 < 0.5 < exposed[-1]


def test_checkpoints_and_reading_cost_what_is_waited_for() -> None:
    saving = Saving(every=10, copied=100.0, written=10.0, written_in_all=40.0)
    # A stop of 800 / 2 / 100 s; writing 800 bytes takes 40 s, of which ten steps hide 10.
    assert saving.seconds(800, 2, step=1.0) == (4.0 + 30.0) / 10
    assert saving.seconds(800, 16, step=2.0) == 800 / 16 / 100 / 10  # 20 s at the rate of the file system
    reading = Reading(workers=2, encoded=100.0, unpacked=1000.0, shards=8)
    assert reading.seconds(400, 4, step=1.0) == pytest.approx(400 / 200 - 1.0)
    assert reading.seconds(400, 4, step=3.0) == 0
    # 16 workers a shard: each makes a token in 1/100 s and passes over 15 of others.
    assert reading.seconds(400, 64, step=0.0) == pytest.approx(400 / 2 * (1 / 100 + 15 / 1000))
