"""What a submission holds for OpenCompass: the configuration, the model wrapper, and what runs them.

The configuration names OpenCompass's own data sets of the competition, as they are in its wheel, and the model.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError
from common.files import write_text
from models.hf_config import read_values, with_rope_at_top

VERSION = "0.3.1"
"""The competition's OpenCompass."""

CONFIG = "palmtop_opencompass.py"
WRAPPER = "palmtop_model.py"
RUN = "run_opencompass.py"

DATASETS = {
    "commonsenseqa": "commonsenseqa.commonsenseqa_7shot_cot_gen_734a22",
    "bbh": "bbh.bbh_gen_5b92b0",
    "gsm8k": "gsm8k.gsm8k_gen_1d7fe4",
    "chid": "FewCLUE_chid.FewCLUE_chid_gen_0a29a2",
    "humaneval": "humaneval.humaneval_gen_8e312c",
    "truthfulqa": "truthfulqa.truthfulqa_gen_5ddc62",
}
"""OpenCompass's name of a data set and the file of its configuration. What fails ends the work on all that follow, so
those come last that need more: HumanEval a package, TruthfulQA the hub."""

Form = Literal["base", "chat"]


@dataclass(frozen=True)
class Submission:
    """A model and how OpenCompass is to ask it."""

    model: Path
    """Its folder."""
    form: Form
    """A chat model is asked through its template."""
    max_out_len: int
    """Most new tokens of CommonsenseQA, CHID and TruthfulQA; the other tasks have 512 of their own."""
    max_seq_len: int | None = None
    """Tokens that a prompt is cut to, from the left. Default: the context that ``config.json`` names."""
    gpus: int = 1
    """0: on the CPU, in fp32. Else fp16, OpenCompass's default."""
    batch_size: int = 8
    """Prompts at a time; OpenCompass's default."""

    def __post_init__(self) -> None:
        if self.form == "chat" and not has_chat_template(self.model):
            raise UserError(
                f"{self.model} has no chat template in its tokenizer_config.json; score it in base form, or give it one"
            )

    @property
    def name(self) -> str:
        """Of the model, in OpenCompass's tables: its folder's, or its run's where the folder is called ``model``."""
        folder = self.model.absolute()
        name = folder.parent.name if folder.name == "model" else folder.name
        return re.sub(r"[^\w.-]+", "-", name) or "model"


def write_submission(submission: Submission, out: Path) -> Path:
    """Write the configuration and what belongs to it into a folder; returns the path of the configuration.

    The configuration names the model by its path from ``out``, so that both can move together.

    Raises:
        UserError: the model is no model folder.
    """
    values = read_values(submission.model)
    out.mkdir(parents=True, exist_ok=True)
    for name in (WRAPPER, RUN):
        shutil.copyfile(Path(__file__).with_name(name), out / name)
    path = os.path.relpath(submission.model.resolve(), out.resolve())
    write_text(out / CONFIG, config_text(submission, path, values))
    return out / CONFIG


def config_text(submission: Submission, path: str, values: dict[str, Any]) -> str:
    """The configuration of a model whose folder has the path and the ``config.json`` that are given."""
    wrapper = "PalmtopChat" if submission.form == "chat" else "PalmtopBase"
    model = {
        "abbr": submission.name,
        "path": path,
        "model_kwargs": {
            "torch_dtype": "torch.float16" if submission.gpus else "torch.float",
            "device_map": "auto" if submission.gpus else "cpu",
            **unread_rope(values),
        },
        "max_seq_len": submission.max_seq_len,
        "max_out_len": submission.max_out_len,
        "batch_size": submission.batch_size,
        "run_cfg": {"num_gpus": min(submission.gpus, 1)},
    }
    bases = "\n".join(
        f"    from opencompass.configs.datasets.{file} import {name}_datasets" for name, file in DATASETS.items()
    )
    datasets = "\n".join(
        f"    *{name}_datasets,"
        if name != "chid"
        else "    chid_datasets[1],  # the test set; the first is the dev set"
        for name in DATASETS
    )
    entries = "\n".join(f"        {name}={value!r}," for name, value in model.items())
    title = f"{submission.name} on the six tasks of the competition with OpenCompass {VERSION}, {submission.form} form."
    return f'''"""{title}

In this folder, with the data sets in $COMPASS_DATA_CACHE/data:

    python {RUN} {CONFIG} --work-dir outputs
"""

from mmengine.config import read_base
from {Path(WRAPPER).stem} import {wrapper}

with read_base():
{bases}
    from opencompass.configs.summarizers.groups.bbh import bbh_summary_groups

datasets = [
{datasets}
]

models = [
    dict(
        type={wrapper},
{entries}
    )
]

summarizer = dict(summary_groups=bbh_summary_groups)
'''


def unread_rope(values: dict[str, Any]) -> dict[str, Any]:
    """Rotary settings that a ``config.json`` has where only transformers 5 looks, for an older one to be told."""
    if not values.get("rope_parameters"):
        return {}
    return {name: value for name, value in with_rope_at_top(values).items() if name not in values and value is not None}


def has_chat_template(model: Path) -> bool:
    """Whether a tokenizer's own settings hold a template, where every release of transformers finds it."""
    try:
        settings = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{model / 'tokenizer_config.json'} cannot be read: {error}") from error
    return bool(settings.get("chat_template"))
