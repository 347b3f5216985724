import gzip
import json
from pathlib import Path

import pytest

from common.errors import UserError
from data.settings import Mix
from data.sources import Corpus, DamagedShardError, LocalShard, lines, open_source, text_of
from tests.conftest import write_shard


def test_a_mix_is_read_as_people_write_it(tmp_path: Path) -> None:
    assert Mix.parse("c4").parts == (("c4", 1.0),)
    assert Mix.parse("c4:en=0.9,c4:zh=0.1").parts == (("c4:en", 0.9), ("c4:zh", 0.1))
    assert Mix.parse("a=3, b=1").parts == (("a", 0.75), ("b", 0.25))
    odd = tmp_path / "a,b=2"
    odd.mkdir()
    assert Mix.parse(str(odd)).parts == ((str(odd), 1.0),)
    assert Mix.parse(str(Mix.parse("a=3,b=1"))) == Mix.parse("a=3,b=1")


@pytest.mark.parametrize("text", ["", "a=,b=1", "a=0", "a=-1,b=1", "a,a", "=1", "a=x"])
def test_what_is_no_mix_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="source"):
        Mix.parse(text)


def test_a_folder_in_c4s_layout_has_training_and_validation_shards(corpus: Path) -> None:
    source = open_source(str(corpus))
    assert [shard.name for shard in source.train] == [f"c4-train.{n:05d}-of-00003.json.gz" for n in range(3)]
    assert [shard.name for shard in source.validation] == ["c4-validation.00000-of-00001.json.gz"]
    assert not source.holds_out
    assert open_source(str(corpus / "en")).train == source.train


def test_a_folder_of_plain_lines_is_a_source_too(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(json.dumps({"text": "hello"}) + "\n")
    source = open_source(str(tmp_path))
    assert source.holds_out
    assert [text_of(line, source.train[0], 1) for line in lines(source.train[0])] == ["hello"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", "neither a folder here nor one of c4"),
        ("{tmp}/empty", "holds no shards"),
        ("{tmp}/two", "several corpora; name one"),
        ("{tmp}/file", "is a file"),
        ("{tmp}/validation", "none to train on"),
    ],
)
def test_what_is_no_source_is_explained(tmp_path: Path, name: str, message: str) -> None:
    for part in ("a", "b"):
        write_shard(tmp_path / "two" / part / "train.json.gz", ["x"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    write_shard(tmp_path / "validation" / "c4-validation.json.gz", ["x"])
    with pytest.raises(UserError, match=message):
        open_source(name.format(tmp=tmp_path))


def test_prepared_and_text_are_not_mixed(corpus: Path, tmp_path: Path, tokenizer) -> None:
    from data.prepare import prepare

    list(prepare(open_source(str(corpus)), tokenizer, tmp_path / "prepared", workers=0))
    with pytest.raises(UserError, match="prepare all of them"):
        Corpus.open(Mix.parse(f"{corpus}=1,{tmp_path / 'prepared'}=1"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"url": "u"}', "line 7 of shard has no field 'text'; its fields are: url"),
        (b"{}", "its fields are: none"),
        (b"{oops", "line 7 of shard is no JSON record"),
        (b"[1]", "is no JSON record"),
        (b'{"text": 5}', "no string but int"),
    ],
)
def test_bad_records_are_named(line: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        text_of(line, LocalShard(Path("shard"), "shard"), 7)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_damaged_gzip_is_found_and_what_came_before_is_given(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "train.json.gz"
    write_shard(path, [f"text number {number} " * 50 for number in range(500)])
    data = bytearray(path.read_bytes())
    if damage == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 0xFF
        path.write_bytes(data)
    else:
        path.write_bytes(b"<html>404 not found</html>")
    shard = LocalShard(path, path.name)
    with pytest.raises(DamagedShardError, match=path.name):
        list(lines(shard))


def test_lines_of_a_real_shard(shared: Path) -> None:
    shard = open_source(str(shared / "datasets" / "c4")).train[0]
    texts = [text_of(line, shard, 1) for line in lines(shard)]
    assert len(texts) == 1200
    with gzip.open(shared / "datasets" / "c4" / "en" / shard.name) as file:
        assert texts[0] == json.loads(file.readline())["text"]
