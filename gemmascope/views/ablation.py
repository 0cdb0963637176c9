"""Components switched off one by one, and what becomes of the next token."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from gemmascope import interventions as verbs
from gemmascope.cache import ActivationCache
from gemmascope.interventions import Intervention
from gemmascope.metrics import Answer, answer_ids
from gemmascope.readout.prompts import names_of_tokens
from gemmascope.views.compare import compared, likeliest
from gemmascope.views.run import Run, array, run_of
from gemmascope.widgets.ablation_bench import BLOCK, AblationBench
from gemmascope.widgets.base import Selection

_SITES = {
    "attn": "hook_attn_out",
    "head": "attn.hook_z",
    "mlp": "hook_mlp_out",
    "dense": "hook_dense_out",
    "moe": "hook_moe_out",
    "neuron": "mlp.hook_post",
    "ple": "hook_ple_out",
}
"""Component -> the point of its block where it is switched off. Experts have a verb of their own."""
_ORDER = ("attn", "head", "mlp", "dense", "moe", "expert", "neuron", "ple")
_PARTS = {"head": "heads", "neuron": "neurons", "expert": "experts"}
NEURONS = 12
"""Neurons that are offered by name: the largest at a position."""


class Edit(NamedTuple):
    """What one layer's switches of one sort do."""

    made: Intervention
    python: str
    """The expression that makes it, once `reference` is there."""


def ablation_bench(
    model,
    prompt,
    *,
    reference: "Sequence[str] | Int[Tensor, 'prompt pos'] | ActivationCache | None" = None,
    answers: Sequence[Answer] | None = None,
    selection: Selection | None = None,
    state: Mapping | None = None,
) -> AblationBench:
    """Switches for every layer, head, expert and neuron; before and after of the next token, and a log.

        bench = gs.ablation_bench(model, prompt, answers=(" Mary", " John"))
        bench.interventions     # what is switched off now, as model(prompt, interventions=...) takes it
        bench.commits           # a row for each commit

    Args:
        prompt: text, token ids, or a cache of one prompt.
        reference: what mean and resample ablation take their activations from: prompts of one length, or the cache of a
            run of them. To resample, they must be as long as the prompt.
        answers: two tokens, whose logit difference is shown.
        selection: the Selection to follow, to link it with other views.
        state: what was chosen in another bench, `bench.state`.

    Raises:
        ValueError: for answers that are not two tokens, reference prompts of several lengths, or a state that names a
            component which the model does not have.
    """
    run = run_of(model, prompt)
    pair = None if answers is None else _pair(run, answers)
    bench = _Bench(run, None if reference is None else _Reference(run, model, reference), pair)
    cfg = run.model.cfg
    parts = ("attn", "mlp", *(("dense", "moe") if cfg.n_experts else ()), *(("ple",) if cfg.d_ple else ()))
    return AblationBench(
        run.texts,
        [{"kind": shape.kind, "neurons": shape.d_mlp} for shape in cfg.layers],
        parts,
        n_heads=cfg.n_heads,
        n_experts=cfg.n_experts or 0,
        kinds=bench.kinds(),
        donors=bench.reference.names if bench.reference else (),
        pair=None if pair is None else dict(zip(pair, map(str, names_of_tokens(run.model, pair)), strict=True)),
        edits=bench.interventions,
        setup=run.setup,
        answers={"effect": run.answering(bench.effect), "neurons": run.answering(bench.neurons)},
        selection=selection,
        state=state,
    )


class _Reference:
    """A run of other prompts."""

    def __init__(self, run: Run, model, given):
        if isinstance(given, ActivationCache):
            if given.model is not model:
                raise ValueError(f"reference is a cache of another model, {given.model.cfg.model_name}.")
            self.cache, self.tokens, padded = given, given.tokens, given._padding is not None
            self.python = "reference = ...  # the cache that was given to ablation_bench"
        else:
            given = given if isinstance(given, Tensor) else [given] if isinstance(given, str) else list(given)
            written = f"torch.tensor({given.tolist()})" if isinstance(given, Tensor) else repr(given)
            needed = "import torch\n" if isinstance(given, Tensor) else ""
            self.python = f"{needed}_, reference = model.run_with_cache({written})"
            begun = model._begin(given)
            self.tokens, padded = begun.tokens, begun.mask is not None
        if padded or self.tokens is None or self.tokens.ndim != 2:
            raise ValueError("The reference prompts have several lengths: give some of one, so that no padding counts.")
        if not isinstance(given, ActivationCache):
            with run.using():
                _, self.cache = run.model.run_with_cache(self.tokens, return_type=None)
        self.names = [model.to_string(row) if model.tokenizer else str(row.tolist()) for row in self.tokens]


class _Bench:
    """A prompt with its own run, and the last one with something switched off."""

    def __init__(self, run: Run, reference: _Reference | None, pair: list[int] | None):
        self.run, self.reference, self.pair = run, reference, pair
        self._last: tuple[list[str], Tensor] = [], run.logits

    def kinds(self) -> dict[str, str]:
        """Kind of ablation -> why it cannot be had, empty where it can."""
        if self.reference is None:
            missing = "Give ablation_bench(..., reference=[...]), several prompts or a cache of them."
            return {"zero": "", "mean": missing, "resample": missing}
        n = self.reference.tokens.shape[1]
        other = f"The reference prompts have {n} tokens and this one {self.run.n}: to resample, give some as long."
        return {"zero": "", "mean": "", "resample": "" if n == self.run.n else other}

    def edits(self, on: list, kind: str, experts: str, donor: int) -> list[Edit]:
        """What the switched components come to: one edit for each layer and sort.

        Raises:
            ValueError: for a kind that cannot be had, or a layer of which no expert is left to step in.
        """
        if self.kinds()[kind]:
            raise ValueError(self.kinds()[kind])
        found: dict[tuple[int, str], list[int]] = {}
        for component, layer, index in on:
            found.setdefault((layer, component), []).append(index)
        return [
            self._edit(component, layer, sorted(indices) if component in _PARTS else None, kind, experts, donor)
            for (layer, component), indices in sorted(found.items(), key=lambda item: (item[0][0], _place(item[0][1])))
        ]

    def interventions(self, **chosen) -> list[Intervention]:
        """The edits as the model takes them."""
        with self.run.using():
            return [edit.made for edit in self.edits(**chosen)]

    def _edit(self, component: str, layer: int, indices: list[int] | None, kind: str, experts: str, donor: int) -> Edit:
        one = indices and (indices[0] if len(indices) == 1 else indices)
        if component == "expert":
            reroute = experts == "reroute"
            if reroute and len(indices) == self.run.model.cfg.n_experts:
                raise ValueError(f"Every expert of layer {layer} is off, and none is left to step in: silence them.")
            made = verbs.drop_expert(layer, one, reroute)[0]
            return Edit(made, f"*gs.drop_expert({layer}, {one}{'' if reroute else ', reroute=False'})")
        site = f"blocks.{layer}.{_SITES[component]}"
        where = {} if indices is None else {_PARTS[component]: one}
        said = "".join(f", {axis}={part}" for axis, part in where.items())
        if kind == "zero":
            return Edit(verbs.zero(site, **where), f'gs.zero("{site}"{said})')
        source = self.reference.cache
        if kind == "mean":
            return Edit(verbs.mean(site, source, **where), f'gs.mean("{site}", reference{said})')
        part = slice(donor, donor + 1)
        source = f'reference["{site}"][{donor}:{donor + 1}]'
        made = verbs.patch(site, self.reference.cache[site][part], **where)
        return Edit(made, f'gs.patch("{site}", {source}{said})')

    def effect(self, on: list, kind: str, experts: str, donor: int, block: int) -> dict[str, Any]:
        """The run with something switched off beside the one without: everywhere in short, and the likeliest tokens of
        one block of positions."""
        edits = self.edits(on, kind, experts, donor)
        lines = [edit.python for edit in edits]
        if lines != self._last[0]:
            made = [edit.made for edit in edits]
            self._last = lines, self.run.model(self.run.tokens[None], interventions=made)[0]
        before, after = self.run.logits, self._last[1]
        part = slice(block * BLOCK, (block + 1) * BLOCK)
        table = likeliest(before[part], after[part])
        ids = table["ids"].unique().tolist()
        ids = [token for token in ids if token >= 0]
        texts = dict(zip(map(str, ids), map(str, names_of_tokens(self.run.model, ids)), strict=True))
        found = compared(before, after, self.run.tokens) | {name: array(of) for name, of in table.items()}
        if self.pair is not None:
            right, wrong = self.pair
            found["difference"] = array(torch.stack([(x[:, right] - x[:, wrong]).float() for x in (before, after)]))
        return found | {"texts": texts, "python": self._python(lines, kind)}

    def _python(self, lines: list[str], kind: str) -> str:
        """Python for the run, after `setup`."""
        uses_reference = kind != "zero" and any("reference" in line for line in lines)
        made = "".join(f"    {line},\n" for line in lines)
        head = f"{self.reference.python}\n" if uses_reference else ""
        return f"{head}interventions = [\n{made}]\nlogits = model(prompt, interventions=interventions)"

    def neurons(self, layer: int, pos: int) -> dict[str, Any]:
        """The neurons of a layer that are largest at a position, with what they are there."""
        post = self.run.stored(("mlp.hook_post", layer))[pos]
        ids = post.abs().nan_to_num().topk(min(NEURONS, len(post))).indices
        return {"ids": array(ids), "values": array(post[ids])}


def _place(component: str) -> int:
    return _ORDER.index(component)


def _pair(run: Run, answers) -> list[int]:
    """The ids of two answers."""
    if isinstance(answers, str | int) or len(answers) != 2:
        raise ValueError(f"answers is {answers!r}: give two tokens, (right, wrong).")
    return [int(answer_ids(run.model, answer)[0]) for answer in answers]
