"""What a model writes on its way, and sums over held-out rows."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.distributed import Job
from data.packing import IGNORE, Batch
from models.hf import load_model
from train.evaluate import summed, write_on

CPU = torch.device("cpu")
OPENINGS = [[1, 20, 30], [1, 40], [1, *range(50, 80)]]


def test_greedy_rows_are_those_of_transformers_one_by_one(micro_model: Path) -> None:
    model, theirs = load_model(micro_model).eval(), AutoModelForCausalLM.from_pretrained(micro_model)
    with torch.no_grad():  # its own logits repeat the last token for ever
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) / 9)
    theirs.load_state_dict(_their_weights(model), strict=False)
    written = write_on(model, OPENINGS, 12, set(), 64, CPU, Job(), temperature=0.0)
    for opening, own in zip(OPENINGS, written, strict=True):
        prompt = torch.tensor([opening])
        expected = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
        assert own == expected[0, len(opening) :].tolist()
    assert len({tuple(own) for own in written}) == 3
    stop = written[0][4]
    stopped = write_on(model, OPENINGS, 12, {stop}, 64, CPU, Job(), temperature=0.0)
    assert stopped[0] == written[0][: written[0].index(stop) + 1]


def _their_weights(model) -> dict[str, torch.Tensor]:
    from models.hf import to_hugging_face

    weights = to_hugging_face(model.state_dict(), model.config)
    return weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}


def test_what_is_sampled_for_a_row_does_not_depend_on_the_others(micro_model: Path) -> None:
    model = load_model(micro_model).eval()
    together = write_on(model, OPENINGS, 8, set(), 64, CPU, Job(), temperature=0.8, seed=3)
    alone = [write_on(model, [one], 8, set(), 64, CPU, Job(), temperature=0.8, seed=3)[0] for one in OPENINGS]
    assert together == alone
    assert together != write_on(model, OPENINGS, 8, set(), 64, CPU, Job(), temperature=0.8, seed=4)


def test_a_long_row_loses_its_beginning(micro_model: Path) -> None:
    model = load_model(micro_model).eval()
    long = list(range(100, 170))
    assert write_on(model, [long], 1, set(), 16, CPU, Job(), temperature=0.0) == write_on(
        model, [long[-16:]], 1, set(), 16, CPU, Job(), temperature=0.0
    )


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_sums_do_not_depend_on_how_many_rows_go_at_a_time(rows: int) -> None:
    inputs = np.arange(15).reshape(5, 3)
    targets = np.where(inputs % 2 == 0, inputs, IGNORE)

    def call(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        assert batch["inputs"].shape == (rows, 3)
        chosen = batch["targets"] != IGNORE
        return torch.stack([batch["inputs"][chosen].sum(), chosen.sum()])

    assert summed(call, Batch(inputs, targets, np.zeros_like(inputs)), rows, CPU, Job()) == [56.0, 8.0, 8.0]
