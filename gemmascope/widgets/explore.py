"""One self-contained page for one prompt: tokens, logit lens, attention of every head, expert selections.

The page is one file with its script, its style and its numbers inside. It asks nothing of the network, and its
Content-Security-Policy forbids it to: only the two inlined texts, named by their hashes, may run or style. Every string
travels as JSON and reaches the document as text, never as markup.
"""

import base64
import hashlib
import json
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int32, UInt8

HERE = Path(__file__).parent
SCRIPTS = ("numbers.js", "parts.js", "attention.js", "explore.js")
"""What the page's one script is joined from: pure functions, shared parts, the largest view, the page."""


def page(
    *,
    model_name: str,
    prompt: str,
    tokens: tuple[str, ...],
    ids: Int32[np.ndarray, " pos"],
    surprise: Float32[np.ndarray, " pos"],
    lens_ids: Int32[np.ndarray, "pos row rank"],
    lens_probs: Float32[np.ndarray, "pos row rank row"],
    lens_tokens: dict[int, str],
    patterns: UInt8[np.ndarray, "layer head query key"],
    block: int,
    layer_kinds: tuple[str, ...],
    window: int,
    n_kv_heads: tuple[int, ...],
    kv_sources: tuple[int | None, ...],
    n_experts: int | None,
    expert_indices: Int32[np.ndarray, "layer pos slot"] | None,
    expert_weights: Float32[np.ndarray, "layer pos slot"] | None,
) -> str:
    """The page as HTML. The arguments are the fields of `gemmascope.explore.Exploration`, which documents them."""
    start_layer, start_head = most_structured_head(patterns)
    arrays = {"surprise": surprise, "lensIds": lens_ids, "lensProbs": lens_probs, "patterns": patterns}
    if n_experts:
        arrays |= {"expertIndices": expert_indices, "expertWeights": expert_weights}
    data = {
        "model": model_name,
        "prompt": prompt,
        "tokens": tokens,
        "ids": ids.tolist(),
        "lensTokens": lens_tokens,
        "block": block,
        "layers": [
            {"kind": kind, "window": window if kind == "sliding" else None, "kvHeads": kv_heads, "kvSource": source}
            for kind, kv_heads, source in zip(layer_kinds, n_kv_heads, kv_sources, strict=True)
        ],
        "nExperts": n_experts,
        "start": {"pos": len(tokens) - 1, "layer": start_layer, "head": start_head},
        "arrays": {name: _packed(array) for name, array in arrays.items()},
    }
    script = "\n".join((HERE / name).read_text("utf-8") for name in SCRIPTS)
    style = (HERE / "explore.css").read_text("utf-8")
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>gemmascope</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws itself with the script it carries; allow scripts to see it.</noscript>
<script type="application/json" id="data">{_script_json(data)}</script>
<script type="module">{script}</script>
</body>
</html>
"""


def most_structured_head(patterns: UInt8[np.ndarray, "layer head query key"]) -> tuple[int, int]:
    """(layer, head) whose queries look hardest at one key other than the first token, themselves and the token before.

    Those three are where heads rest when they have nothing to say, so what is left is the head most worth a first look.
    The score is the mean over queries of the largest such weight; a prompt too short to have any gives (0, 0).
    """
    side = patterns.shape[-1]
    best, choice = 0.0, (0, 0)
    for layer, layer_patterns in enumerate(patterns):
        elsewhere = np.tril(layer_patterns, -2)[:, :, 1:]
        scores = elsewhere.max(-1, initial=0).mean(-1) if side else np.zeros(len(elsewhere))
        if scores.max() > best:
            best, choice = scores.max(), (layer, int(scores.argmax()))
    return choice


def _packed(array: np.ndarray) -> dict[str, object]:
    """An array as JSON: deflated because attention is mostly zeros, base64 because the page is text."""
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return {
        "dtype": array.dtype.name,
        "shape": array.shape,
        "data": base64.b64encode(zlib.compress(little_endian.tobytes(), 9)).decode("ascii"),
    }


def _script_json(data: dict[str, object]) -> str:
    """JSON that cannot end or comment out the <script> element it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode('utf-8')).digest()).decode('ascii')}'"
