"""The table of sizes."""

import pytest

from common.errors import UserError
from models.budget import parameters
from models.sizes import SIZES, ModelConfig, adapt, size
from models.transformer import Transformer


@pytest.mark.parametrize("name", SIZES)
def test_a_row_states_its_parameters(name: str) -> None:
    assert parameters(SIZES[name].config).total == SIZES[name].parameters


@pytest.mark.parametrize("name", ["tiny", "15m"])
def test_a_built_model_has_them(name: str) -> None:
    model = Transformer(SIZES[name].config)
    assert sum(parameter.numel() for parameter in model.parameters()) == SIZES[name].parameters


def test_an_untied_model_without_qk_norm_too() -> None:
    config = ModelConfig(3, 24, 6, 2, 8, 40, 50, 16, tied=False, qk_norm=False)
    assert sum(parameter.numel() for parameter in Transformer(config).parameters()) == parameters(config).total


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_named_for_their_parameters(name: str) -> None:
    number = name.removeprefix("c4-")
    if number != "tiny":
        said = float(number[:-1]) * {"m": 1e6, "b": 1e9}[number[-1]]
        assert SIZES[name].parameters == pytest.approx(said, rel=0.35)  # the papers' names are loose


def test_an_unknown_size_lists_the_closest_first() -> None:
    with pytest.raises(
        UserError, match=r"no size is called '1bb'; the sizes are 1b, .*tiny.* \(closest first\)"
    ) as error:
        size("1bb")
    assert all(name in str(error.value) for name in SIZES)


def test_adapt_keeps_what_is_not_given() -> None:
    config = size("tiny").config
    assert adapt(config) == config
    changed = adapt(config, vocab=100, qk_norm=False)
    assert (changed.vocab, changed.qk_norm, changed.context) == (100, False, config.context)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 0, "at least 1, not 0"),
        ("kv_heads", 2, "3 query heads cannot share 2"),
        ("head_width", 7, "7 is odd"),
    ],
)
def test_an_impossible_shape_is_refused(field: str, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{**vars(size("tiny").config), field: value})
