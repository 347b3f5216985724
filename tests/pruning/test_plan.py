"""Targets and the shapes that meet them."""

from dataclasses import replace

import pytest

from common.errors import UserError
from common.settings import Count
from models import budget
from models.hf_config import to_config
from models.sizes import SIZES
from pruning.phone import WORKSPACE, on_phone
from pruning.plan import cache_tokens, candidates, describe, shortlist
from pruning.settings import Bytes, CutSettings, ShapeSettings, Target, resolve
from pruning.shapes import Shape, check, parameters, step
from tests.pruning.test_shapes import LLAMA_3, PHI_2, QWEN2, values_of

SMOLLM2 = LLAMA_3 | {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}


def asked(params: str | None = None, phone: str | None = None, **settled: object) -> ShapeSettings:
    target = Target.parse(params) if params else None
    return ShapeSettings(params=target, phone_memory=Bytes.parse(phone) if phone else None, **settled)  # type: ignore[arg-type]


def test_amounts() -> None:
    assert Bytes.parse("8GB") == Bytes.parse("8 g") == Bytes.parse(8_000_000_000) == 8 * 10**9
    assert Bytes.parse("6.5GB") == 6_500_000_000
    assert Bytes.parse("1.5GiB") == 3 * 2**29
    assert Target.parse("0.8").of(1000) == Target.parse(".8").of(1000) == 800
    assert Target.parse("3.8B").of(1000) == 3_800_000_000
    for kind, wrong in (
        (Bytes, "8 GHz"),
        (Bytes, "much"),
        (Target, "1.5"),
        (Target, "0.0"),
        (Target, "1"),
        (Target, "-1"),
    ):
        with pytest.raises(ValueError, match=r"memory|count|whole|share"):
            kind.parse(wrong)


@pytest.mark.parametrize("values", [LLAMA_3, QWEN2, PHI_2, SMOLLM2], ids=["llama", "qwen2", "phi", "smollm2"])
@pytest.mark.parametrize("target", ["0.9", "0.8", "0.6", "0.4"])
def test_shapes_are_legal_and_near_the_target(values: dict, target: str) -> None:
    now = Shape.of(values)
    goal = float(target) * parameters(values, now)
    found = candidates(values, asked(target), 8_000)
    for one in found:
        check(values, one.shape)
        half = (parameters(values, replace(one.shape, ffn=one.shape.ffn + step(values))) - one.parameters) / 2
        assert abs(one.parameters - goal) <= max(0.005 * goal, half)
        assert (one.shape.heads, one.shape.kv_heads) == (now.heads, now.kv_heads)
    assert len({one.shape for one in found}) == len(found)


@pytest.mark.parametrize(
    ("values", "memory", "billions"),
    [
        (LLAMA_3, "8GB", 3.8), (LLAMA_3, "6.5GB", 3.1), (LLAMA_3, "4.56GB", 2.1),
        (QWEN2, "8GB", 3.9), (QWEN2, "6.5GB", 3.1), (QWEN2, "4.56GB", 2.1), (PHI_2, "4.56GB", 2.0),
    ],
)  # fmt: skip
def test_real_models_on_a_phone(values: dict, memory: str, billions: float) -> None:
    """The budgets of an 8 GB application, a cautious one, and MLC-LLM's own gate."""
    settings = asked(phone=memory)
    found = candidates(values, settings, 8_000)
    assert found[0].parameters / 1e9 == pytest.approx(billions, abs=0.07)  # a flatter model has a smaller cache
    for one in found:
        assert settings.phone_memory is not None
        assert one.phone.total == 2 * one.parameters + one.phone.cache + WORKSPACE <= settings.phone_memory
        assert one.phone.passes_gate == (memory == "4.56GB")


def test_a_model_that_meets_the_target_is_not_cut() -> None:
    with pytest.raises(UserError, match="fits as it is: 6.09 GB of the 8 GB"):
        candidates(PHI_2, asked(phone="8GB"), 8_000)
    with pytest.raises(UserError, match="134,.* already; a target of 3.8B"):
        candidates(SMOLLM2, asked("3.8B"), 8_000)


def test_the_vocabulary_goes_first_and_heads_last() -> None:
    found = candidates(SMOLLM2, asked("0.8"), 8_000)
    assert found[0].shape == Shape(30, 1232, 9, 3, 29_472)
    tried = [one.shape for one in shortlist(SMOLLM2, found, 3)]
    assert tried == [found[0].shape, Shape(30, 1152, 9, 3, 36_864), Shape(27, 1432, 9, 3, 29_472)]
    assert [one.shape for one in shortlist(SMOLLM2, found, 1)] == [found[0].shape]
    assert len(shortlist(SMOLLM2, found, 1000)) == len(found)
    without_heads = Shape(30, 8, 9, 3, 29_472)
    assert parameters(SMOLLM2, without_heads) > 0.3 * parameters(SMOLLM2, Shape.of(SMOLLM2))
    cut = candidates(SMOLLM2, asked("0.3", layers=30), 8_000)
    assert cut[0].shape.kv_heads == 3 > cut[-1].shape.kv_heads


def test_the_vocabulary_is_kept_where_it_must_be() -> None:
    for settings, smallest in ((asked("0.8", vocab="keep"), 8_000), (asked("0.8"), None), (asked("0.8"), 45_000)):
        assert {one.shape.vocab for one in candidates(SMOLLM2, settings, smallest)} == {49_152}
    with pytest.raises(UserError, match="cannot be cut; leave the vocabulary whole"):
        candidates(SMOLLM2, asked("0.8", vocab=Count(24_000)), None)
    with pytest.raises(UserError, match="--vocab 24,000 is too small: .* make 30,000"):
        candidates(SMOLLM2, asked("0.8", vocab=Count(24_000)), 30_000)


def test_axes_can_be_settled() -> None:
    alone = {
        "ffn": Shape(30, 1016, 9, 3, 49_152),
        "layers": Shape(22, 1536, 9, 3, 49_152),
        "kv_heads": Shape(30, 1536, 6, 2, 49_152),  # with its query heads
        "heads": Shape(30, 1536, 6, 3, 49_152),
        "vocab": Shape(30, 1536, 9, 3, 24_576),
    }
    settled = {"ffn": Count(1016), "layers": 22, "kv_heads": 2, "heads": 6, "vocab": Count(24_576)}
    for name, shape in alone.items():
        (only,) = candidates(SMOLLM2, asked(**{name: settled[name]}), 8_000)  # type: ignore[arg-type]
        assert only.shape == shape
    both = candidates(SMOLLM2, asked("0.8", vocab=Count(24_576)), 8_000)
    assert both[0].shape == Shape(30, 1288, 9, 3, 24_576)
    by_depth = candidates(SMOLLM2, asked("0.8", vocab="keep", ffn=Count(1536)), 8_000)
    assert [one.shape.layers for one in by_depth] == [22]  # within half a layer
    with pytest.raises(UserError, match="ffn 1,017 is no multiple of 8"):
        candidates(SMOLLM2, asked(ffn=Count(1017)), 8_000)
    with pytest.raises(UserError, match="--kv-heads takes 1 to 3, which the model has, not 4"):
        candidates(SMOLLM2, asked(kv_heads=4), 8_000)
    with pytest.raises(UserError, match="14 query heads"):
        candidates(QWEN2, asked("0.8", heads=14), 8_000)


def test_what_no_shape_reaches_names_the_nearest() -> None:
    with pytest.raises(
        UserError, match=r"meets 1.0% of the parameters; the nearest are 1 layers, feed-forward 8, heads"
    ):
        candidates(SMOLLM2, asked("0.01"), 8_000)
    with pytest.raises(UserError, match=r"\(its heads cannot be cut\) meets 1 GB on the phone at 1,024 tokens; the"):
        candidates(PHI_2, asked(phone="1GB", layers=32), 8_000)
    assert describe(SMOLLM2, asked("3.8B")) == "3.8B parameters"


def test_the_cache_is_no_longer_than_the_context() -> None:
    assert cache_tokens(SMOLLM2, asked()) == 1024
    short = SMOLLM2 | {"max_position_embeddings": 256}
    for settings, tokens in ((asked("0.8"), 256), (asked("0.8", context=Count(100)), 100)):
        assert candidates(short, settings, 8_000)[0].phone.context == tokens
    with pytest.raises(UserError, match="--context 1,000 is longer than the model's context of 256"):
        candidates(short, asked("0.8", context=Count(1000)), 8_000)


def test_a_phone_holds_our_models_as_the_budget_says() -> None:
    for name in ("tiny", "125m", "1b"):
        config = SIZES[name].config
        values = to_config(config, bos=1, eos=2, pad=0)
        phone = on_phone(values, Shape.of(values), 2048)
        assert phone.weights + phone.cache == budget.phone_bytes(config, 2048)
        assert phone.decode_ceiling == pytest.approx(budget.decode_ceiling(config, 2048))


def test_biases_count_on_the_phone() -> None:
    values = values_of("phi")
    assert on_phone(values, Shape.of(values), 16).weights == 2 * parameters(values, Shape.of(values))


def test_wide_layers_are_calibrated_on_more_text() -> None:
    assert resolve(CutSettings(), 1536, 2048).tokens == 192 * 512
    assert resolve(CutSettings(), 14_336, 2048).tokens == 16 * 14_336
    assert resolve(CutSettings(tokens=Count(1000)), 14_336, 2048).tokens == 1024
    assert resolve(CutSettings(tokens=Count(1000)), 14_336, 64).seq_len == 64
