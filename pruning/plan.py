"""Which shapes meet a target, and in what order they are worth trying. Imports nothing heavy.

For every choice of vocabulary, depth and heads there is one feed-forward width that comes nearest to the target. The
order of what is cut first follows what a cut costs at equal size, measured on SmolLM2: the vocabulary least, then
feed-forward units, then layers, and heads only where nothing else is left.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import gigabytes
from models.hf_config import nearest_shape, within_context
from pruning.phone import WORKSPACE, Phone, on_phone
from pruning.settings import CONTEXT, ShapeSettings
from pruning.shapes import Shape, check, head_counts, parameters, rules_of, step

VOCABULARIES = (0.6, 0.75, 1.0)
"""Shares of the vocabulary to try: of five, three quarters is the best on C4, less harms other text (docs/log.md)."""

THIN = 3 / 8
"""Share of the feed-forward width below which layers go first."""

TOLERANCE = 0.005
"""How far the parameters may be from the target, in shares of it; half a step of the free axis where that is more."""

NEAREST = 3
"""Shapes that are named when none meets the target."""


@dataclass(frozen=True)
class Candidate:
    """A legal shape and its cost."""

    shape: Shape
    parameters: int
    phone: Phone


def candidates(values: dict[str, Any], settings: ShapeSettings, smallest_vocab: int | None) -> list[Candidate]:
    """Every legal uniform shape that meets the target, the one to try first at the front.

    Args:
        values: the model's ``config.json``.
        settings: the target and the axes that are settled.
        smallest_vocab: tokens that must stay; None where the tokenizer cannot be cut.

    Raises:
        UserError: the model meets the target as it is, what is settled is not legal, or no legal shape meets the
            target; then the nearest are named.
    """
    now = Shape.of(values)
    _check_settled(values, settings, smallest_vocab)
    if settings.params is None and settings.phone_memory is None:
        return [_candidate(values, replace(now, **_with_heads(values, settings)), settings)]
    _refuse_if_met(values, settings)
    with_heads = "heads" in settings.settled or "kv_heads" in settings.settled
    found, missed = _search(values, settings, smallest_vocab, with_heads=with_heads)
    if not found and not with_heads:
        found, more = _search(values, settings, smallest_vocab, with_heads=True)
        missed += more
    if not found:
        raise UserError(_none_meets(values, settings, missed))
    return sorted(found, key=lambda one: _order(now, one.shape))


def shortlist(values: dict[str, Any], found: Sequence[Candidate], count: int) -> list[Candidate]:
    """A few candidates that differ in kind: by vocabulary, then by depth in steps of an eighth, then whatever follows.

    ``found`` is in the order of :func:`candidates`, whose first is always among them.
    """
    first = found[0].shape
    eighth = max(1, Shape.of(values).layers // 8)
    by_vocab = [one for one in found if replace(one.shape, vocab=0, ffn=0) == replace(first, vocab=0, ffn=0)]
    by_depth = [
        one
        for one in found
        if one.shape.vocab == first.vocab and (first.layers - one.shape.layers) % eighth == 0 and one not in by_vocab
    ]
    mixed = [one for pair in itertools.zip_longest(by_vocab[1:], by_depth) for one in pair if one is not None]
    chosen = [found[0], *mixed]
    return [*chosen, *(one for one in found if one not in chosen)][:count]


def cache_tokens(values: dict[str, Any], settings: ShapeSettings) -> int:
    """Tokens in the phone's cache; UserError where the model's context is shorter than what is asked for."""
    return within_context("--context", settings.context, CONTEXT, nearest_shape(values, Path()).context)


def describe(values: dict[str, Any], settings: ShapeSettings) -> str:
    """The target in words."""
    if settings.phone_memory is not None:
        return f"{gigabytes(settings.phone_memory)} on the phone at {cache_tokens(values, settings):,} tokens"
    if settings.params is not None:
        share = settings.params.share
        return f"{settings.params} parameters" if share is None else f"{share:.1%} of the parameters"
    return "the shape that is settled"


def _check_settled(values: dict[str, Any], settings: ShapeSettings, smallest_vocab: int | None) -> None:
    """Raise a UserError where a settled axis is not legal whatever the others are."""
    now = Shape.of(values)
    check(values, replace(now, **_with_heads(values, settings)))
    vocab = settings.settled.get("vocab", now.vocab)
    if vocab < now.vocab and smallest_vocab is None:
        raise UserError("the tokenizer is of a kind that cannot be cut; leave the vocabulary whole: --vocab keep")
    if vocab < now.vocab and smallest_vocab is not None and vocab < smallest_vocab:
        raise UserError(
            f"--vocab {vocab:,} is too small: special tokens, bytes and {settings.chinese_tokens:,} Chinese tokens "
            f"(--chinese-tokens) make {smallest_vocab:,}"
        )


def _with_heads(values: dict[str, Any], settings: ShapeSettings) -> dict[str, int]:
    """What is settled; where one of heads and key/value heads is, the other follows: whole groups go."""
    settled, now = dict(settings.settled), Shape.of(values)
    group = now.heads // now.kv_heads
    if "kv_heads" in settled and "heads" not in settled:
        settled["heads"] = settled["kv_heads"] * group
    if "heads" in settled and "kv_heads" not in settled:
        legal = [kv for heads, kv in head_counts(values) if heads == settled["heads"]]
        settled["kv_heads"] = max(legal, default=now.kv_heads)
    return settled


def _refuse_if_met(values: dict[str, Any], settings: ShapeSettings) -> None:
    now = Shape.of(values)
    count, phone = parameters(values, now), _on_phone(values, now, settings)
    if settings.phone_memory is not None and phone.total <= settings.phone_memory:
        raise UserError(
            f"the model fits as it is: {gigabytes(phone.total)} of the {gigabytes(settings.phone_memory)} on the phone "
            f"with {phone.context:,} tokens of context; to cut it all the same, give a smaller target"
        )
    if settings.params is not None and settings.params.of(count) >= count:
        raise UserError(f"the model has {count:,} parameters already; a target of {settings.params} cuts nothing")


def _search(
    values: dict[str, Any], settings: ShapeSettings, smallest_vocab: int | None, *, with_heads: bool
) -> tuple[list[Candidate], list[Candidate]]:
    """Shapes that meet the target, and those that come nearest to it for their depth, vocabulary and heads."""
    now, settled = Shape.of(values), _with_heads(values, settings)
    layers = [settled["layers"]] if "layers" in settled else range(now.layers, 0, -1)
    heads = [(now.heads, now.kv_heads)]
    if "heads" in settled:
        heads = [(settled["heads"], settled["kv_heads"])]
    elif with_heads:
        heads = head_counts(values)
    met: list[Candidate] = []
    missed: list[Candidate] = []
    for depth, vocab, (query, kv) in itertools.product(layers, _vocabularies(values, settings, smallest_vocab), heads):
        shape = Shape(depth, now.ffn, query, kv, vocab)
        shape = replace(shape, ffn=settled["ffn"]) if "ffn" in settled else _fitted(values, shape, settings)
        one = _candidate(values, shape, settings)
        (met if _meets(values, one, settings) else missed).append(one)
    return met, missed


def _vocabularies(values: dict[str, Any], settings: ShapeSettings, smallest: int | None) -> list[int]:
    """Vocabularies to try, the smallest first: multiples of four steps, and the present one."""
    now = Shape.of(values).vocab
    if "vocab" in settings.settled:
        return [settings.settled["vocab"]]
    if settings.vocab == "keep" or smallest is None:
        return [now]
    coarse = 4 * step(values)
    cut = {int(share * now) // coarse * coarse for share in VOCABULARIES if share < 1}
    return [*sorted(vocab for vocab in cut if vocab >= smallest), now]


def _goal(values: dict[str, Any], shape: Shape, settings: ShapeSettings) -> int:
    """Parameters that the target leaves to a shape of this depth and these heads."""
    if settings.phone_memory is not None:
        return (settings.phone_memory - WORKSPACE - _on_phone(values, shape, settings).cache) // 2
    assert settings.params is not None
    return settings.params.of(parameters(values, Shape.of(values)))


def _fitted(values: dict[str, Any], shape: Shape, settings: ShapeSettings) -> Shape:
    """The shape with the feed-forward width that comes nearest to the target; on a phone, the widest that fits."""
    multiple = step(values)
    a_step = parameters(values, replace(shape, ffn=2 * multiple)) - parameters(values, replace(shape, ffn=multiple))
    steps = (_goal(values, shape, settings) - parameters(values, replace(shape, ffn=0))) / a_step
    wanted = int(steps // 1 if settings.phone_memory is not None else round(steps)) * multiple
    if wanted > shape.ffn - multiple / 2:  # the full width need not be a multiple
        wanted = shape.ffn
    return replace(shape, ffn=max(multiple, wanted))


def _meets(values: dict[str, Any], one: Candidate, settings: ShapeSettings) -> bool:
    """Whether it is within the tolerance of the target, on a phone from below."""
    goal = _goal(values, one.shape, settings)
    slack = max(TOLERANCE * goal, _half_step(values, one.shape, settings))
    if settings.phone_memory is not None:
        return one.phone.total <= settings.phone_memory and goal - one.parameters <= 2 * slack
    return abs(one.parameters - goal) <= slack


def _half_step(values: dict[str, Any], shape: Shape, settings: ShapeSettings) -> float:
    """Half of the parameters that the finest free axis moves at a time; 0 where none is free."""
    if "ffn" not in settings.settled:
        finer = replace(shape, ffn=shape.ffn + step(values))
    elif "layers" not in settings.settled:
        finer = replace(shape, layers=shape.layers + 1)
    else:
        return 0
    return (parameters(values, finer) - parameters(values, shape)) / 2


def _order(now: Shape, shape: Shape) -> tuple[float, ...]:
    """What is tried first: all heads, feed-forward halves that are not thin, all layers, a small vocabulary."""
    return (
        now.kv_heads - shape.kv_heads,
        now.heads - shape.heads,
        shape.ffn < THIN * now.ffn,
        now.layers - shape.layers,
        shape.vocab,
    )


def _candidate(values: dict[str, Any], shape: Shape, settings: ShapeSettings) -> Candidate:
    return Candidate(shape, parameters(values, shape), _on_phone(values, shape, settings))


def _on_phone(values: dict[str, Any], shape: Shape, settings: ShapeSettings) -> Phone:
    return on_phone(values, shape, cache_tokens(values, settings))


def _none_meets(values: dict[str, Any], settings: ShapeSettings, missed: Sequence[Candidate]) -> str:
    """The message that names the nearest shapes."""

    def distance(one: Candidate) -> float:
        if settings.phone_memory is not None:
            return abs(one.phone.total - settings.phone_memory)
        return abs(one.parameters - _goal(values, one.shape, settings))

    nearest = sorted(missed, key=distance)[:NEAREST]
    listed = "; ".join(f"{summary(one.shape)}: {one.parameters:,}, {gigabytes(one.phone.total)}" for one in nearest)
    kept = "" if rules_of(values).heads != "kept" else " (its heads cannot be cut)"
    return f"no legal shape of this model{kept} meets {describe(values, settings)}; the nearest are {listed}"


def summary(shape: Shape) -> str:
    """A shape in a few words."""
    return (
        f"{shape.layers} layers, feed-forward {shape.ffn:,}, heads {shape.heads}/{shape.kv_heads}, "
        f"vocabulary {shape.vocab:,}"
    )
