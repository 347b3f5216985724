"""Shards of a dataset on the hub: which there are, and that each byte is fetched once whatever happens."""

import gzip
import hashlib
import json
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.hub import FIRST_RANGE, HubShard
from tests.data.fake_hub import C4_CARD, COMMIT, FakeHub

REPO = "allenai/c4"
NAME = "en/c4-train.00000-of-00005.json.gz"
CONTENT = gzip.compress(random.Random(0).randbytes(5_000_000), compresslevel=0)
FILES = {
    "README.md": C4_CARD,
    NAME: CONTENT,
    **{f"en/c4-train.0000{index}-of-00005.json.gz": gzip.compress(b"%d" % index) for index in range(1, 5)},
    "en/c4-validation.00000-of-00001.json.gz": gzip.compress(b"validation"),
    "en.noblocklist/c4-train.00000-of-00001.json.gz": gzip.compress(b"noblocklist"),
    "multilingual/c4-zh.tfrecord-00000-of-00001.json.gz": gzip.compress(b"zh"),
    "multilingual/c4-zh-validation.tfrecord-00000-of-00001.json.gz": gzip.compress(b"zh validation"),
}
SHARD = HubShard(f"hf://datasets/{REPO}@{COMMIT}/{NAME}", NAME, len(CONTENT))

READ = """
import hashlib, os, pickle, sys, time
waits = []
time.sleep = waits.append
from common.errors import UserError
shard = pickle.load(sys.stdin.buffer)
try:
    with shard.open() as file:
        {body}
except UserError as error:
    print("UserError:", error)
"""
DIGEST = "print(hashlib.sha256(file.read()).hexdigest(), waits)"

RESOLVE = """
import json, sys
from common.errors import UserError
from data.hub import resolve
for repo, config in json.loads(sys.argv[1]):
    try:
        splits = resolve(repo, config)
        print(json.dumps({split: [[s.url, s.name, s.size] for s in shards] for split, shards in splits.items()}))
    except UserError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub({REPO: FILES, "some/gated": FILES}, gated=frozenset({"some/gated"})) as server:
        yield server


def start_reader(hub: FakeHub, folder: Path, body: str = DIGEST) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", READ.format(body=body)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=hub.environment(folder)
    )
    assert process.stdin is not None
    process.stdin.write(pickle.dumps(SHARD))
    process.stdin.close()
    process.stdin = None
    return process


def read(hub: FakeHub, folder: Path, body: str = DIGEST) -> str:
    out, errors = start_reader(hub, folder, body).communicate(timeout=60)
    assert b"Traceback" not in errors, errors.decode()
    return out.decode().strip()


def resolve(environment: dict[str, str], *questions: tuple[str, str | None]) -> list[Any]:
    command = [sys.executable, "-c", RESOLVE, json.dumps(questions)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def expected(waits: str = "[]") -> str:
    return f"{hashlib.sha256(CONTENT).hexdigest()} {waits}"


def cached(folder: Path) -> Path:
    return folder / "palmtop" / "hub" / "allenai--c4" / COMMIT / NAME


def part(folder: Path) -> Path:
    return cached(folder).with_name(cached(folder).name + ".part")


def test_resolve_lists_shards_of_a_config_with_sizes(hub: FakeHub, tmp_path: Path) -> None:
    questions = [(REPO, "en"), (REPO, "zh"), (REPO, "en.noblock"), (REPO, None), ("allenai/none", "en")]
    en, zh, unknown, unnamed, missing, gated, odd = resolve(
        hub.environment(tmp_path), *questions, ("some/gated", "en"), ("c4 en", None)
    )

    def shards(prefix: str) -> list[list[Any]]:
        names = sorted(name for name in FILES if name.startswith(prefix))
        return [[f"hf://datasets/{REPO}@{COMMIT}/{name}", name, len(FILES[name])] for name in names]

    assert en == {"train": shards("en/c4-train."), "validation": shards("en/c4-validation.")}
    assert zh == {"train": shards("multilingual/c4-zh."), "validation": shards("multilingual/c4-zh-validation.")}
    assert "no config 'en.noblock'; it has en.noblocklist, en, zh" in unknown
    assert "it has en, en.noblocklist, zh" in unnamed
    assert "no dataset allenai/none" in missing
    assert "some/gated is gated" in gated
    assert "'c4 en' cannot be the name" in odd
    assert not any(".gz" in request for request in hub.requests), "no shard is read or asked for by itself"
    assert hub.requests[f"GET tree {REPO}/en"] == 2, "two pages, listed once"


def test_resolve_without_the_hub_offers_a_local_folder(tmp_path: Path) -> None:
    with FakeHub({}) as gone:
        environment = gone.environment(tmp_path)
    assert "--data DIR" in resolve(environment, (REPO, "en"))[0]
    assert "HF_HUB_OFFLINE is set" in resolve(environment | {"HF_HUB_OFFLINE": "1"}, (REPO, "en"))[0]


def test_two_readings_fetch_a_shard_once(hub: FakeHub, tmp_path: Path) -> None:
    assert read(hub, tmp_path) == expected()
    assert hub.requests == {f"GET {REPO}/{NAME}": 3}, "1 MiB, 2 MiB and the rest"
    assert read(hub, tmp_path, "import gzip; print(len(gzip.open(file).read()))") == "5000000"
    assert hub.served == {NAME: len(CONTENT)}
    assert [path.name for path in cached(tmp_path).parent.iterdir()] == [cached(tmp_path).name]


def test_a_short_reading_fetches_the_first_range_alone(hub: FakeHub, tmp_path: Path) -> None:
    assert read(hub, tmp_path, "print(file.read(5000).hex())") == CONTENT[:5000].hex()
    assert hub.served == {NAME: FIRST_RANGE}


def test_a_killed_reader_leaves_what_it_fetched(hub: FakeHub, tmp_path: Path) -> None:
    reader = start_reader(hub, tmp_path, "file.read(2_000_000); os.kill(os.getpid(), 9)")
    reader.communicate(timeout=60)
    assert reader.returncode == -signal.SIGKILL
    assert part(tmp_path).read_bytes() == CONTENT[: 3 * FIRST_RANGE]
    assert read(hub, tmp_path) == expected()
    assert hub.served == {NAME: len(CONTENT)}


@pytest.mark.parametrize("length", [100_001, len(CONTENT)], ids=["within a range", "before the rename"])
def test_a_kill_while_writing_does_no_harm(hub: FakeHub, tmp_path: Path, length: int) -> None:
    part(tmp_path).parent.mkdir(parents=True)
    part(tmp_path).write_bytes(CONTENT[:length])
    assert read(hub, tmp_path) == expected()
    assert hub.served.total() == len(CONTENT) - length
    assert cached(tmp_path).read_bytes() == CONTENT


def test_two_processes_share_one_download(hub: FakeHub, tmp_path: Path) -> None:
    hub.delay_s = 0.2
    readers = [start_reader(hub, tmp_path) for _ in range(2)]
    assert [reader.communicate(timeout=60)[0].decode().strip() for reader in readers] == [expected(), expected()]
    assert hub.served == {NAME: len(CONTENT)}


def test_passing_failures_are_waited_out(hub: FakeHub, tmp_path: Path) -> None:
    hub.fail(429, 503, "drop")
    assert read(hub, tmp_path) == expected("[8.0, 2, 4]"), "the hub asked for 7 s after the first"
    assert cached(tmp_path).read_bytes() == CONTENT


def test_a_lasting_failure_keeps_what_was_fetched(hub: FakeHub, tmp_path: Path) -> None:
    assert read(hub, tmp_path, "print(len(file.read(9)))") == "9"
    hub.fail(*[503] * 6)
    failed = read(hub, tmp_path)
    assert f"UserError: {SHARD.url} cannot be fetched from byte {FIRST_RANGE}" in failed
    assert "HTTP 503" in failed
    assert "kept" in failed
    assert read(hub, tmp_path) == expected()
    assert hub.served == {NAME: len(CONTENT)}


def test_a_damaged_file_is_named(hub: FakeHub, tmp_path: Path) -> None:
    cached(tmp_path).parent.mkdir(parents=True)
    for damaged in (cached(tmp_path), part(tmp_path)):
        damaged.write_bytes(CONTENT + b"more")
        assert f"{damaged} is damaged" in read(hub, tmp_path)
        damaged.unlink()
