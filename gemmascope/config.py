"""What a Gemma 4 text model is made of: a frozen dataclass, its reading from a raw `config.json`, the published sizes.

The raw JSON is parsed here, never through transformers' config object: since transformers 5.15 its `head_dim` and
`num_key_value_heads` raise on this family, and `global_head_dim` is gone, while the files on the hub did not change.
"""

import difflib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

LayerKind = Literal["sliding", "global"]

_HF_KIND: dict[str, LayerKind] = {"sliding_attention": "sliding", "full_attention": "global"}
_TEXT_TYPES = ("gemma4_text", "gemma4_unified_text")
_MULTIMODAL_TYPES = ("gemma4", "gemma4_unified")


_TOP_LEVEL = ("dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")
_REQUIRED = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size",
)  # fmt: skip
_REQUIRED_OF_MOE = ("num_experts", "top_k_experts", "moe_intermediate_size")


class LayerGeometry(NamedTuple):
    """The shape of one layer. In Gemma 4 these differ from layer to layer, so they live here and not on the model."""

    kind: LayerKind
    """"sliding" sees the last `window` positions, "global" sees all of them."""
    d_head: int
    n_kv_heads: int
    d_mlp: int
    kv_source: int | None
    """The layer whose keys and values this one reads; None when it has its own."""
    k_is_v: bool
    """Keys and values come from one projection (V is still not K: it is taken before the key norm and rope)."""
    window: int | None
    """Visible keys a query, itself included; None on global layers."""
    rope_theta: float
    rope_fraction: float
    """Share of the head's dimensions that rotate."""


@dataclass(frozen=True)
class Gemma4Config:
    """The text model of one Gemma 4. TransformerLens's names where the meaning is the same."""

    n_layers: int
    d_model: int
    n_heads: int
    """Query heads, the same in every layer."""
    d_vocab: int
    n_ctx: int
    """Longest sequence the model was trained for, in tokens."""
    layer_kinds: tuple[LayerKind, ...]
    window: int
    """Keys a sliding layer sees, the query's own included."""
    d_head_sliding: int
    d_head_global: int
    n_kv_heads_sliding: int
    n_kv_heads_global: int
    d_mlp_narrow: int
    """Width of the dense MLP where it is not doubled."""
    double_wide_mlp: bool = False
    """KV-shared layers have an MLP twice as wide (E2B)."""
    n_kv_shared_layers: int = 0
    """How many of the last layers read an earlier layer's keys and values."""
    k_is_v: bool = False
    """Global layers have no value projection (12B, 26B-A4B, 31B)."""
    n_experts: int | None = None
    experts_per_token: int | None = None
    d_expert: int | None = None
    d_ple: int | None = None
    """Width of the per-layer embeddings; None where there are none."""
    d_vocab_ple: int | None = None
    final_softcap: float | None = 30.0
    eps: float = 1e-6
    rope_theta_sliding: float = 1e4
    rope_theta_global: float = 1e6
    rope_fraction_global: float = 0.25
    bidirectional_images: bool = False
    """Sliding layers let the tokens of one image see each other (12B, 26B-A4B, 31B)."""
    pad_token_id: int = 0
    eos_token_id: int | tuple[int, ...] = 1
    bos_token_id: int = 2
    model_name: str = "gemma-4"
    dtype: Any = "float32"
    """A name here, a torch.dtype on a built model's cfg."""
    device: Any = "cpu"

    normalization_type = "RMS"
    act_fn = "gelu_pytorch_tanh"
    attn_only = False

    def __post_init__(self):
        if len(self.layer_kinds) != self.n_layers:
            raise ValueError(f"layer_kinds names {len(self.layer_kinds)} layers but n_layers is {self.n_layers}.")
        for kind, n_kv in (("sliding", self.n_kv_heads_sliding), ("global", self.n_kv_heads_global)):
            if self.n_heads % n_kv:
                raise ValueError(f"n_heads={self.n_heads} is not a multiple of the {n_kv} kv heads of {kind} layers.")
        if self.n_experts is not None and not 1 <= self.experts_per_token <= self.n_experts:
            raise ValueError(f"A token cannot go to {self.experts_per_token} of {self.n_experts} experts.")
        owners = self.layer_kinds[: self.n_layers - self.n_kv_shared_layers]
        for kind in set(self.layer_kinds) - set(owners):
            raise ValueError(f"No {kind} layer of its own below the {self.n_kv_shared_layers} KV-shared layers.")

    @cached_property
    def layers(self) -> tuple[LayerGeometry, ...]:
        """The geometry of every layer."""
        first_shared = self.n_layers - self.n_kv_shared_layers
        # A shared layer reads the last layer of its kind that still has keys and values of its own.
        source = {kind: layer for layer, kind in enumerate(self.layer_kinds[:first_shared])}
        return tuple(
            self._geometry(layer, kind, source[kind] if layer >= first_shared else None)
            for layer, kind in enumerate(self.layer_kinds)
        )

    def _geometry(self, layer: int, kind: LayerKind, kv_source: int | None) -> LayerGeometry:
        sliding = kind == "sliding"
        return LayerGeometry(
            kind=kind,
            d_head=self.d_head_sliding if sliding else self.d_head_global,
            n_kv_heads=self.n_kv_heads_sliding if sliding else self.n_kv_heads_global,
            d_mlp=self.d_mlp_narrow * (2 if self.double_wide_mlp and kv_source is not None else 1),
            kv_source=kv_source,
            k_is_v=self.k_is_v and not sliding,
            window=self.window if sliding else None,
            rope_theta=self.rope_theta_sliding if sliding else self.rope_theta_global,
            rope_fraction=1.0 if sliding else self.rope_fraction_global,
        )

    @property
    def d_head(self) -> int:
        return self._same_everywhere("d_head")

    @property
    def n_key_value_heads(self) -> int:
        return self._same_everywhere("n_kv_heads")

    @property
    def d_mlp(self) -> int:
        return self._same_everywhere("d_mlp")

    def _same_everywhere(self, field: str) -> int:
        """One number for the whole model, or an error where a single number would lie."""
        values = sorted({getattr(layer, field) for layer in self.layers})
        if len(values) > 1:
            raise AttributeError(
                f"{field} differs between the layers of {self.model_name} ({values}): "
                f"read it from model.layer(l).{field}."
            )
        return values[0]

    @classmethod
    def from_hf(cls, raw: dict, model_name: str = "gemma-4") -> "Gemma4Config":
        """Reads the raw dictionary of a `config.json`: gemma4, gemma4_unified (their text part) or gemma4_text.

        Both spellings of the global layers' shape are read: `global_head_dim` (the hub's files) and `per_layer_config`
        (files re-saved by transformers 5.15 and later).

        Raises:
            ValueError: for another architecture, or for a setting that this model does not have.
        """
        model_type = raw.get("model_type")
        if model_type in _MULTIMODAL_TYPES:
            if not isinstance(raw.get("text_config"), dict):
                raise ValueError(f"config.json of a {model_type} model has no text_config.")
            # What the top level says holds for the text model too, unless that says otherwise.
            text = {key: raw[key] for key in _TOP_LEVEL if raw.get(key) is not None}
            text |= {key: value for key, value in raw["text_config"].items() if value is not None}
            # The instruction-tuned files list their several stop ids at the top level only.
            text["eos_token_id"] = raw.get("eos_token_id") or text.get("eos_token_id")
        elif model_type in _TEXT_TYPES:
            text = {key: value for key, value in raw.items() if value is not None}
        else:
            known = (*_MULTIMODAL_TYPES, *_TEXT_TYPES)
            near = difflib.get_close_matches(str(model_type), known, n=1)
            raise ValueError(
                f"config.json has model_type {model_type!r}; gemmascope reads {', '.join(known)}"
                + (f" (did you mean {near[0]!r}?)." if near else ".")
            )
        missing = [
            key for key in _REQUIRED + (_REQUIRED_OF_MOE if text.get("enable_moe_block") else ()) if key not in text
        ]
        if missing:
            raise ValueError(f"config.json lacks {', '.join(missing)}.")
        _refuse_unknown(text)

        kinds = tuple(_HF_KIND[kind] for kind in _layer_types(text))
        rope = {
            "full_attention": {"rope_theta": 1e6, "partial_rotary_factor": 0.25},
            "sliding_attention": {"rope_theta": 1e4},
        }
        for layer_type, given in (text.get("rope_parameters") or {}).items():
            rope[layer_type] = {"rope_theta": rope[layer_type]["rope_theta"], **given}
        d_head_global, n_kv_global = _global_shape(text, kinds)
        moe = bool(text.get("enable_moe_block"))
        d_ple = text.get("hidden_size_per_layer_input", 256) or None
        eos = text.get("eos_token_id") or 1
        return cls(
            n_layers=text["num_hidden_layers"],
            d_model=text["hidden_size"],
            n_heads=text["num_attention_heads"],
            d_vocab=text["vocab_size"],
            n_ctx=text.get("max_position_embeddings", 131072),
            layer_kinds=kinds,
            window=text.get("sliding_window", 512),
            d_head_sliding=text.get("head_dim", 256),
            d_head_global=d_head_global,
            n_kv_heads_sliding=text["num_key_value_heads"],
            n_kv_heads_global=n_kv_global,
            d_mlp_narrow=text["intermediate_size"],
            double_wide_mlp=bool(text.get("use_double_wide_mlp")),
            n_kv_shared_layers=text.get("num_kv_shared_layers") or 0,
            k_is_v=bool(text.get("attention_k_eq_v")),
            n_experts=text["num_experts"] if moe else None,
            experts_per_token=text["top_k_experts"] if moe else None,
            d_expert=text["moe_intermediate_size"] if moe else None,
            d_ple=d_ple,
            d_vocab_ple=text.get("vocab_size_per_layer_input", 262144) if d_ple else None,
            final_softcap=text.get("final_logit_softcapping"),
            eps=text.get("rms_norm_eps", 1e-6),
            rope_theta_sliding=rope["sliding_attention"]["rope_theta"],
            rope_theta_global=rope["full_attention"]["rope_theta"],
            rope_fraction_global=rope["full_attention"].get("partial_rotary_factor", 1.0),
            bidirectional_images=text.get("use_bidirectional_attention") == "vision",
            pad_token_id=text.get("pad_token_id") or 0,
            eos_token_id=tuple(eos) if isinstance(eos, list) else eos,
            bos_token_id=text.get("bos_token_id", 2),
            model_name=model_name,
            dtype=text.get("dtype") or text.get("torch_dtype") or "float32",
        )

    def to_hf(self) -> dict:
        """The raw `config.json` (gemma4_text) of this model, in the hub's own spelling."""
        kind = {ours: hf for hf, ours in _HF_KIND.items()}
        eos = self.eos_token_id
        return {
            "architectures": ["Gemma4ForCausalLM"],
            "model_type": "gemma4_text",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attention_k_eq_v": self.k_is_v,
            "bos_token_id": self.bos_token_id,
            "dtype": str(self.dtype).removeprefix("torch."),
            "enable_moe_block": self.n_experts is not None,
            "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
            "final_logit_softcapping": self.final_softcap,
            "global_head_dim": self.d_head_global,
            "head_dim": self.d_head_sliding,
            "hidden_activation": self.act_fn,
            "hidden_size": self.d_model,
            "hidden_size_per_layer_input": self.d_ple or 0,
            "intermediate_size": self.d_mlp_narrow,
            "layer_types": [kind[k] for k in self.layer_kinds],
            "max_position_embeddings": self.n_ctx,
            "moe_intermediate_size": self.d_expert,
            "num_attention_heads": self.n_heads,
            "num_experts": self.n_experts,
            "num_global_key_value_heads": self.n_kv_heads_global if self.k_is_v else None,
            "num_hidden_layers": self.n_layers,
            "num_key_value_heads": self.n_kv_heads_sliding,
            "num_kv_shared_layers": self.n_kv_shared_layers,
            "pad_token_id": self.pad_token_id,
            "rms_norm_eps": self.eps,
            "rope_parameters": {
                "full_attention": {
                    "partial_rotary_factor": self.rope_fraction_global,
                    "rope_theta": self.rope_theta_global,
                    "rope_type": "proportional",
                },
                "sliding_attention": {"rope_theta": self.rope_theta_sliding, "rope_type": "default"},
            },
            "sliding_window": self.window,
            "tie_word_embeddings": True,
            "top_k_experts": self.experts_per_token,
            "use_bidirectional_attention": "vision" if self.bidirectional_images else None,
            "use_double_wide_mlp": self.double_wide_mlp,
            "vocab_size": self.d_vocab,
            "vocab_size_per_layer_input": self.d_vocab_ple or self.d_vocab,
        }


def _refuse_unknown(text: dict) -> None:
    """Every setting that would change the arithmetic and that no Gemma 4 text model has is refused, not ignored."""
    fixed = {
        "hidden_activation": ("gelu_pytorch_tanh", None),
        "attention_bias": (False, None),
        "tie_word_embeddings": (True, None),
        "attention_dropout": (0, 0.0, None),
        "use_bidirectional_attention": (None, "vision"),
    }
    for key, accepted in fixed.items():
        if text.get(key) not in accepted:
            raise ValueError(
                f"config.json sets {key}={text[key]!r}; Gemma 4 text models have {accepted[0]!r}, "
                "and gemmascope computes nothing else."
            )
    kinds = {"full_attention": "proportional", "sliding_attention": "default"}
    for layer_type, rope in (text.get("rope_parameters") or {}).items():
        if layer_type not in kinds or rope.get("rope_type", kinds[layer_type]) != kinds[layer_type]:
            raise ValueError(
                f"config.json sets rope_type {rope.get('rope_type')!r} for {layer_type}; "
                f"gemmascope computes {kinds.get(layer_type)!r} there."
            )
        known = ("rope_type", "rope_theta") + (("partial_rotary_factor",) if layer_type == "full_attention" else ())
        others = {key: value for key, value in rope.items() if key not in known and value not in (None, 1.0)}
        if others:
            raise ValueError(f"config.json sets {others} for the rope of {layer_type}; gemmascope reads {known} there.")
    unknown = sorted(set(text.get("layer_types") or ()) - set(_HF_KIND))
    if unknown:
        raise ValueError(f"config.json has layer types {unknown}; gemmascope computes {sorted(_HF_KIND)}.")
    if text.get("quantization_config"):
        raise ValueError(
            "config.json has a quantization_config; load the unquantized checkpoint "
            "(for QAT models, the -unquantized repository)."
        )


def _layer_types(text: dict) -> list[str]:
    n_layers = text["num_hidden_layers"]
    default = ["full_attention" if (layer + 1) % 6 == 0 else "sliding_attention" for layer in range(n_layers)]
    types = list(text.get("layer_types") or default)
    types[-1] = "full_attention"  # the family's rule, which transformers applies on load as well
    return types


def _global_shape(text: dict, kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """(d_head, kv heads) of the global layers, from either spelling."""
    d_head, n_kv = text.get("head_dim", 256), text["num_key_value_heads"]
    per_layer = text.get("per_layer_config")
    if per_layer is None:
        n_kv_global = text.get("num_global_key_value_heads") if text.get("attention_k_eq_v") else None
        return text.get("global_head_dim") or 512, n_kv_global or n_kv
    own = {int(layer): values for layer, values in per_layer.items()}  # written with leading zeros: "05"
    strange = sorted({key for values in own.values() for key in values} - {"head_dim", "num_key_value_heads"})
    if strange:
        raise ValueError(
            f"per_layer_config sets {', '.join(strange)}; in Gemma 4 only head widths and kv heads differ."
        )
    shapes: dict[LayerKind, set] = {"sliding": set(), "global": set()}
    for layer, kind in enumerate(kinds):
        values = own.get(layer, {})
        shapes[kind].add((values.get("head_dim", d_head), values.get("num_key_value_heads", n_kv)))
    if len(shapes["global"]) > 1 or shapes["sliding"] - {(d_head, n_kv)}:
        raise ValueError(
            f"per_layer_config gives layers of one kind different shapes ({shapes}); Gemma 4 has one shape a kind."
        )
    return shapes["global"].pop()


def _preset(n_layers: int, every: int, name: str, **sizes) -> Gemma4Config:
    kinds: tuple[LayerKind, ...] = tuple(
        "global" if (layer + 1) % every == 0 else "sliding" for layer in range(n_layers)
    )
    shared = dict(
        n_layers=n_layers,
        layer_kinds=kinds,
        d_vocab=262144,
        d_head_sliding=256,
        d_head_global=512,
        dtype="bfloat16",
        model_name=name,
    )
    return Gemma4Config(**shared, **sizes)


_EDGE = dict(n_ctx=131072, window=512, n_heads=8, d_ple=256, d_vocab_ple=262144)
_LARGE = dict(n_ctx=262144, window=1024, k_is_v=True, bidirectional_images=True)

PRESETS: dict[str, Gemma4Config] = {
    "google/gemma-4-E2B": _preset(
        35,
        5,
        "google/gemma-4-E2B",
        **_EDGE,
        d_model=1536,
        d_mlp_narrow=6144,
        n_kv_heads_sliding=1,
        n_kv_heads_global=1,
        n_kv_shared_layers=20,
        double_wide_mlp=True,
    ),
    "google/gemma-4-E4B": _preset(
        42,
        6,
        "google/gemma-4-E4B",
        **_EDGE,
        d_model=2560,
        d_mlp_narrow=10240,
        n_kv_heads_sliding=2,
        n_kv_heads_global=2,
        n_kv_shared_layers=18,
    ),
    "google/gemma-4-12B": _preset(
        48,
        6,
        "google/gemma-4-12B",
        **_LARGE,
        d_model=3840,
        d_mlp_narrow=15360,
        n_heads=16,
        n_kv_heads_sliding=8,
        n_kv_heads_global=1,
    ),
    "google/gemma-4-26B-A4B": _preset(
        30,
        6,
        "google/gemma-4-26B-A4B",
        **_LARGE,
        d_model=2816,
        d_mlp_narrow=2112,
        n_heads=16,
        n_kv_heads_sliding=8,
        n_kv_heads_global=2,
        n_experts=128,
        experts_per_token=8,
        d_expert=704,
    ),
    "google/gemma-4-31B": _preset(
        60,
        6,
        "google/gemma-4-31B",
        **_LARGE,
        d_model=5376,
        d_mlp_narrow=21504,
        n_heads=32,
        n_kv_heads_sliding=16,
        n_kv_heads_global=4,
    ),
}
"""The five published sizes, by their hub id."""
