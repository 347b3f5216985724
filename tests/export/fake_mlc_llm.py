"""A stand-in for ``mlc_llm`` that keeps to its command line; what it writes is copied from our own MLC folder.

In the environment ``FAKE_MLC_OURS`` names that folder, and ``FAKE_MLC`` a step that fails, or ``other-weights`` or
``other-config``.
"""

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

parser = argparse.ArgumentParser()
steps = parser.add_subparsers(dest="step", required=True)
for name in ("convert_weight", "gen_config"):
    step = steps.add_parser(name)
    step.add_argument("config", type=Path)
    step.add_argument("--quantization", choices=["q0f16"], required=True)
    step.add_argument("--output", type=Path, required=True)
step.add_argument("--conv-template", choices=["LM"], required=True)
step.add_argument("--context-window-size", type=int)
step.add_argument("--prefill-chunk-size", type=int)
step.add_argument("--max-batch-size", type=int, choices=[1], required=True)
step = steps.add_parser("compile")
step.add_argument("model", type=Path)
step.add_argument("--device", choices=["android"], required=True)
step.add_argument("--system-lib-prefix", required=True)
step.add_argument("--output", type=Path, required=True)
step = steps.add_parser("package")
step.add_argument("--mlc-llm-source-dir", type=Path, required=True)
asked = parser.parse_args()

ours, wish = Path(os.environ["FAKE_MLC_OURS"]), os.environ.get("FAKE_MLC")
if wish == asked.step:
    sys.exit(f"{asked.step}: it cannot be done")
print(f"{asked.step} is under way")
if asked.step == "convert_weight":
    (asked.config.parent / "model.safetensors.index.json").write_text("{}")  # as MLC-LLM does
    assert (asked.config.parent / "model.safetensors").exists()
    asked.output.mkdir(parents=True)
    for file in ours.glob("params_shard_*.bin"):
        shutil.copy(file, asked.output)
    cache = (ours / "tensor-cache.json").read_text()
    if wish == "other-weights":
        cache = cache.replace('"md5sum": "', '"md5sum": "0')
    (asked.output / "tensor-cache.json").write_text(cache)
elif asked.step == "gen_config":
    assert json.loads(asked.config.read_text())["rope_theta"] > 0
    asked.output.mkdir(parents=True)
    config = json.loads((ours / "mlc-chat-config.json").read_text()) | {"conv_template": {"name": "LM"}}
    assert (asked.context_window_size, asked.prefill_chunk_size) == (
        config["context_window_size"],
        config["prefill_chunk_size"],
    )
    if wish == "other-config":
        config["model_config"]["rope_theta"] = 1.0
    (asked.output / "mlc-chat-config.json").write_text(json.dumps(config))
elif asked.step == "compile":
    assert asked.model.exists()
    asked.output.write_bytes(b"library")
else:
    wanted = json.loads(Path("mlc-package-config.json").read_text())
    (model,) = wanted["model_list"]
    assert (Path(model["model"]) / "tensor-cache.json").exists()
    assert Path(wanted["model_lib_path_for_prepare_libs"][model["model_lib"]]).exists()
    Path("dist", "lib", "mlc4j").mkdir(parents=True)
