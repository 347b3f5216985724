"""DeepSpeed computes what one process does; what a user's JSON may decide. (More of it in test_strategies.py.)"""

import json
from pathlib import Path

import pytest

from common.errors import UserError
from tests.train.test_strategies import ADAMW, TAUGHT, compare, run_variants
from train.deepspeed import make_strategy
from train.settings import TrainSettings, model_config, resolve

VARIANTS = [
    ("deepspeed-2", 2, ADAMW, "--micro-batch 8", 1e-5),
    ("deepspeed-2", 2, ADAMW, "--micro-batch 4", 1e-5),
    ("deepspeed-2", 2, ADAMW, "--activation-checkpointing selective", 1e-5),
    ("deepspeed-3", 2, ADAMW, "--micro-batch 8", 1e-5),
    ("deepspeed-3", 2, ADAMW, "--micro-batch 4", 1e-5),
    ("deepspeed-3", 2, ADAMW, "--activation-checkpointing full", 1e-5),
    ("deepspeed-3", 2, TAUGHT, "", 1e-5),
    ("deepspeed-3-offload", 2, ADAMW, "--micro-batch 4", 1e-5),
    ("deepspeed-3", 2, ADAMW, "--precision bf16", 2e-3),
]
"""As in test_strategies.py."""


@pytest.fixture(scope="module")
def found(corpus: Path, micro_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return run_variants(VARIANTS, corpus, micro_model, tmp_path_factory.mktemp("deepspeed"))


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: " ".join(map(str, variant[:4])))
def test_the_losses_are_those_of_one_process(variant: tuple, found) -> None:
    compare(variant, found)


def config(tmp_path: Path, values: object, strategy: str = "deepspeed-2") -> dict:
    path = tmp_path / "deepspeed.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    settings = TrainSettings(deepspeed_config=str(path))
    return make_strategy(settings, strategy, False, {"process_group_backend": "gloo"}).config


def test_it_lies_over_ours(tmp_path: Path) -> None:
    made = config(tmp_path, {"zero_optimization": {"reduce_bucket_size": 7}, "steps_per_print": 3})
    assert made["zero_optimization"] == {
        "stage": 2,
        "contiguous_gradients": True,
        "overlap_comm": False,
        "reduce_bucket_size": 7,
    }
    assert made["steps_per_print"] == 3
    assert made["gradient_clipping"] == 1.0


def test_offload_goes_to_host_memory(tmp_path: Path) -> None:
    zero = config(tmp_path, {}, "deepspeed-3-offload")["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"train_batch_size": 8, "optimizer": {}}, "sets optimizer, train_batch_size, which the run's own settings"),
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read as JSON"),
        ({"zero_optimization": {"stage": 1}}, "stage 1, but --strategy deepspeed-2 is stage 2"),
    ],
)
def test_what_it_may_not_decide_is_refused(tmp_path: Path, values: object, says: str) -> None:
    with pytest.raises(UserError, match=says):
        config(tmp_path, values)


def test_muon_is_refused() -> None:
    settings = TrainSettings(size="tiny", strategy="deepspeed-3")
    settings.optimizer.name = "muon"
    with pytest.raises(UserError, match="muon needs whole matrices"):
        resolve(settings, model_config(settings))
