"""The shapes that a model can be cut to, and what they cost. Imports nothing heavy.

A shape is legal when transformers and MLC-LLM both build it from ``config.json`` alone and when it is a choice of the
model's own units: layers, feed-forward units, vocabulary, and attention heads, of which a query head never leaves its
key/value head. The model width stays.

Letters: L layers, D model width, H query heads, K key/value heads, N head width, F feed-forward width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

from common.errors import UserError
from models.hf_config import head_width, key_value_heads, with_rope_at_top

SMALL = 500_000_000
"""Parameters below which a width may be any multiple of 8; from there on it is one of 64."""


@dataclass(frozen=True)
class Shape:
    """What may be cut of a model."""

    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Shape":
        """The shape that a ``config.json`` describes; UserError where it is no architecture of :data:`RULES`."""
        rules_of(values)
        try:
            return cls(
                layers=values["num_hidden_layers"],
                ffn=values["intermediate_size"],
                heads=values["num_attention_heads"],
                kv_heads=key_value_heads(values),
                vocab=values["vocab_size"],
            )
        except KeyError as missing:
            raise UserError(f"the model's config.json has no {missing}") from missing


@dataclass(frozen=True)
class Rules:
    """What an architecture is made of, and how its heads may be cut."""

    gated: bool
    """Three matrices in the feed-forward half (gate, up, down); otherwise two (fc1, fc2)."""
    heads: Literal["any", "divisors", "kept"]
    """Any number of query heads, one that divides D, or the number that there is."""
    norms: int
    """Norms of width D in a layer."""
    layer_norm: bool
    """Norms have biases (LayerNorm); otherwise weights alone (RMSNorm)."""
    qk_norm: bool
    """Queries and keys have norms of width N."""
    head_bias: bool
    """The output matrix has a bias of width V."""
    biases: tuple[bool | str, bool | str, bool | str]
    """Of the projections to queries, keys and values; of attention's output; of the feed-forward matrices: always,
    never, or as the setting of ``config.json`` says."""


_ATTENTION, _MLP = "attention_bias", "mlp_bias"

# fmt: off
RULES: dict[str, Rules] = {
    # Layers, feed-forward units and vocabulary are free in all of them. transformers refuses a Llama whose H does not
    # divide D, though its head_dim is explicit, and so does MLC-LLM; MLC-LLM takes N = D / H in Qwen2 and Phi.
    #                         gated  heads       norms LayerNorm  qk-norm head's biases: qkv, out, feed-forward
    "LlamaForCausalLM": Rules(True,  "divisors", 2,    False,     False,  False, (_ATTENTION, _ATTENTION, _MLP)),
    "Qwen2ForCausalLM": Rules(True,  "kept",     2,    False,     False,  False, (True, False, False)),
    "Qwen3ForCausalLM": Rules(True,  "any",      2,    False,     True,   False, (_ATTENTION, _ATTENTION, False)),
    "PhiForCausalLM":   Rules(False, "kept",     1,    True,      False,  True,  (True, True, True)),
}
# fmt: on


def rules_of(values: dict[str, Any]) -> Rules:
    """The row of a ``config.json``.

    Raises:
        UserError: there is none for its architecture, or the model has layers of different kinds, which cannot be
            dropped freely.
    """
    named = (values.get("architectures") or ["none named"])[0]
    if named not in RULES:
        raise UserError(f"the model is a {named}; pruning takes {', '.join(RULES)}")
    if values.get("use_sliding_window"):
        raise UserError("the model has sliding windows in some layers, which pruning does not know how to cut")
    return RULES[named]


def parameters(values: dict[str, Any], shape: Shape) -> int:
    """Exact number of stored parameters that the model of ``values`` has when it is cut to ``shape``.

    A tied head counts once.
    """
    rules, width, head = rules_of(values), values["hidden_size"], head_width(values)
    qkv_bias, out_bias, ffn_bias = (
        bool(values.get(bias, False)) if isinstance(bias, str) else bias for bias in rules.biases
    )
    norm = 2 if rules.layer_norm else 1
    queries, keys = shape.heads * head, shape.kv_heads * head
    attention = (width + qkv_bias) * (queries + 2 * keys) + (queries + out_bias) * width
    if rules.qk_norm:
        attention += 2 * head
    if values.get("qk_layernorm"):  # of Phi, with biases
        attention += 4 * head
    ffn = (3 if rules.gated else 2) * width * shape.ffn
    ffn += ffn_bias * ((2 if rules.gated else 1) * shape.ffn + width)
    matrices = 1 if values.get("tie_word_embeddings", False) else 2
    ends = matrices * shape.vocab * width + rules.head_bias * shape.vocab + norm * width
    return shape.layers * (attention + ffn + rules.norms * norm * width) + ends


def step(values: dict[str, Any]) -> int:
    """What widths are multiples of, feed-forward and vocabulary alike: 64, in models below :data:`SMALL` 8."""
    return 8 if parameters(values, Shape.of(values)) < SMALL else 64


def head_counts(values: dict[str, Any]) -> list[tuple[int, int]]:
    """Every legal (H, K), the present one first, then by falling H and K.

    Whole groups go, or the same number of query heads from every group.
    """
    rules, now = rules_of(values), Shape.of(values)
    if rules.heads == "kept":
        return [(now.heads, now.kv_heads)]
    group = now.heads // now.kv_heads
    pairs = {(kv * each, kv) for kv in range(1, now.kv_heads + 1) for each in range(1, group + 1)}
    if rules.heads == "divisors":
        pairs = {(heads, kv) for heads, kv in pairs if values["hidden_size"] % heads == 0}
    return [(now.heads, now.kv_heads), *sorted(pairs - {(now.heads, now.kv_heads)}, reverse=True)]


def check(values: dict[str, Any], shape: Shape) -> None:
    """Raise a UserError that says why ``shape`` is no legal cut of the model, where it is none."""
    now, multiple = Shape.of(values), step(values)
    for name in ("layers", "ffn", "kv_heads", "heads", "vocab"):  # where kv_heads alone are asked for, heads follow
        had, wanted = getattr(now, name), getattr(shape, name)
        if not 1 <= wanted <= had:
            raise UserError(f"--{name.replace('_', '-')} takes 1 to {had:,}, which the model has, not {wanted:,}")
    for name in ("ffn", "vocab"):
        had, wanted = getattr(now, name), getattr(shape, name)
        if wanted != had and wanted % multiple:
            near = max(multiple, round(wanted / multiple) * multiple)
            raise UserError(f"{name} {wanted:,} is no multiple of {multiple}; the nearest that is, is {near:,}")
    legal = head_counts(values)
    if (shape.heads, shape.kv_heads) not in legal:
        choices = ", ".join(f"{heads}/{kv}" for heads, kv in legal)
        raise UserError(
            f"{shape.heads} query heads on {shape.kv_heads} key/value heads cannot be cut from this model: "
            f"transformers and MLC-LLM together take {choices}"
        )


def resized(values: dict[str, Any], shape: Shape) -> dict[str, Any]:
    """The ``config.json`` of the model cut to ``shape``, its rotary settings at the top level too."""
    changes: dict[str, Any] = {
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
    }
    if rules_of(values).heads != "kept":
        changes["head_dim"] = head_width(values)  # D / H is another number once heads are gone
    if values.get("layer_types"):
        changes["layer_types"] = values["layer_types"][: shape.layers]  # all of one kind, see rules_of
    return with_rope_at_top(values | changes)
