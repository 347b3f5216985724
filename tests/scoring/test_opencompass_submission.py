"""What a submission holds for OpenCompass: read by OpenCompass's own reader, and the wrapper at work."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from scoring.opencompass import Submission, write_submission
from scoring.opencompass.submission import CONFIG, WRAPPER
from scoring.opencompass.summary import DATASETS
from tests.scoring.opencompass_reader import parsed


def test_the_configuration_read_by_opencompass_own_reader(micro_model, tmp_path):
    write_submission(Submission(micro_model, "chat", 1024, max_seq_len=512, gpus=2), tmp_path)
    config = parsed(tmp_path / CONFIG)
    lengths = {dataset["abbr"]: dataset["max_out_len"] for dataset in config["datasets"]}
    assert set(lengths) == DATASETS
    assert len(lengths) == 27 + 5
    assert list(lengths)[-1] == "truthful_qa"
    open_ended = {name for name, length in lengths.items() if length is None}
    assert open_ended == {"commonsense_qa", "chid-test", "truthful_qa"}
    assert {length for name, length in lengths.items() if name not in open_ended} == {512}
    (model,) = config["models"]
    assert (tmp_path / model["path"]).resolve() == micro_model.resolve()
    del model["path"]
    assert model == {
        "type": "palmtop_model.PalmtopChat",
        "abbr": micro_model.name,
        "model_kwargs": {"torch_dtype": "torch.float16", "device_map": "auto"},
        "max_seq_len": 512,
        "max_out_len": 1024,
        "batch_size": 8,
        "run_cfg": {"num_gpus": 1},
    }
    (group,) = config["summarizer"]["summary_groups"]
    assert group["name"] == "bbh"
    assert set(group["subsets"]) <= set(lengths)


def test_a_chat_score_needs_a_template(micro_model, tmp_path):
    model = shutil.copytree(micro_model, tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": None}))
    Submission(model, "base", 256)
    with pytest.raises(UserError, match="no chat template"):
        Submission(model, "chat", 256)


def test_rotary_settings_that_an_older_transformers_would_not_see(micro_model, tmp_path):
    model = shutil.copytree(micro_model, tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    del values["rope_theta"]
    values["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    values.pop("rope_scaling", None)
    (model / "config.json").write_text(json.dumps(values))
    write_submission(Submission(model, "base", 256, gpus=0), tmp_path / "out")
    text = (tmp_path / "out" / CONFIG).read_text()
    assert "'rope_theta': 500000.0, 'rope_scaling': {'rope_type': 'linear', 'factor': 2.0}}" in text
    assert "'torch_dtype': 'torch.float', 'device_map': 'cpu'" in text


def test_the_wrapper_reads_a_tokenizer_that_transformers_5_wrote(micro_model, tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    calls = []
    newer = shutil.copytree(micro_model, tmp_path / "newer")
    settings = json.loads((newer / "tokenizer_config.json").read_text())
    (newer / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "TokenizersBackend"}))

    class Theirs:
        def _load_tokenizer(self, *arguments):
            calls.append(arguments)

        def _load_model(self, path, kwargs, **adapter):
            calls.append((path, kwargs))

    models = type(sys)("opencompass.models")
    models.HuggingFaceBaseModel = models.HuggingFacewithChatTemplate = Theirs
    monkeypatch.setitem(sys.modules, "opencompass", type(sys)("opencompass"))
    monkeypatch.setitem(sys.modules, "opencompass.models", models)
    write_submission(Submission(newer, "chat", 256), tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, Path(WRAPPER).stem, raising=False)
    from palmtop_model import PalmtopChat

    wrapped = PalmtopChat()
    wrapped._load_tokenizer(str(newer), {})
    ours, theirs = wrapped.tokenizer, AutoTokenizer.from_pretrained(micro_model)
    messages = [{"role": "user", "content": "the of and"}]
    assert ours.apply_chat_template(messages, tokenize=False) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours("the of <|user|>")["input_ids"] == theirs("the of <|user|>")["input_ids"]
    assert ours(["the", "the of and to"], padding=True)["attention_mask"][0][0] == 0
    assert ours("a b c d", truncation=True, max_length=1)["input_ids"] == ours("a b c d")["input_ids"][-1:]
    assert (ours.eos_token_id, ours.pad_token_id) == (theirs.eos_token_id, theirs.pad_token_id)
    assert not calls
    other = shutil.copytree(micro_model, tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    wrapped._load_tokenizer(str(other), {})
    wrapped._load_model(str(other), {"torch_dtype": "auto"})
    assert calls[0] == (str(other), {"trust_remote_code": False}, None)
    assert calls[1][1] == {"trust_remote_code": False, "use_safetensors": True, "torch_dtype": "auto"}
