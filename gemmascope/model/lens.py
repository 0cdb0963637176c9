"""What TransformerLens users and tools expect of a model, apart from its arithmetic: caching, text, named weights."""

from contextlib import contextmanager
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gemmascope.cache import ActivationCache
from gemmascope.generate import KVCache, generate
from gemmascope.hooks import HookedModel, Progress
from gemmascope.interventions import hooks_of
from gemmascope.rerun import Activations, Rerun
from gemmascope.tokenizer import Gemma4Tokenizer


class LensModel(HookedModel):
    """Satisfies transformer_lens.model_protocol.TransformerLensModelWithWeights.

    A subclass brings the arithmetic, as `_begin` and `forward` (see HookedGemma4).
    """

    tokenizer: Gemma4Tokenizer | None

    def run_with_cache(
        self,
        input,
        *,
        names_filter=None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice=None,
        return_cache_object: bool = True,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_kv_cache: KVCache | None = None,
        image_blocks: Tensor | None = None,
        prepend_bos: bool | None = None,
        interventions=(),
        **run_kwargs,
    ):
        """TransformerLens's run_with_cache: (what forward returns, an ActivationCache).

        By default the stream before each block is kept, and a block is run again when the cache is asked for what is
        inside it, as the run had it; blocks with hooks are stored. What `names_filter` names is stored. So is
        everything with `past_kv_cache`, `pos_slice`, `incl_bwd`, `reset_hooks_end=False` or
        `return_cache_object=False`, but for attention patterns and scores, per-head results and per-slot expert
        outputs, which are always recomputed unless named. `incl_bwd` runs backward from the output, so it needs
        return_type="loss". `interventions` are in effect: what is cached is what they left. Other arguments are
        forward's.
        """
        run = self._begin(input, attention_mask, position_ids, past_kv_cache, image_blocks, prepend_bos)
        if remove_batch_dim and len(run.tokens) > 1:
            raise ValueError(f"remove_batch_dim needs one prompt, and there are {len(run.tokens)}.")
        if incl_bwd and (run_kwargs.get("return_type") != "loss" or run_kwargs.get("loss_per_token")):
            raise ValueError('incl_bwd runs backward from one number: pass return_type="loss".')
        again = names_filter is None and past_kv_cache is None and pos_slice is None and not incl_bwd
        with self.with_interventions(interventions):
            changed = self.changed_expansions()
            stored, fwd, bwd = self.get_caching_hooks(names_filter, incl_bwd, device, remove_batch_dim, None, pos_slice)
            if again and reset_hooks_end and return_cache_object:
                run.record = Rerun(self, fwd, device)
                fwd = run.record.readers[-1]
            with self.hooks(fwd, bwd, reset_hooks_end, clear_contexts):
                out = self(run, **run_kwargs)
                if incl_bwd:
                    out.backward()
                else:
                    changed |= self.changed_expansions()  # a hook may have added another
        if not return_cache_object:
            return out, stored
        if run.record is not None:
            run.record.close(run)
            views = [lambda name, tensor: tensor[0]] if remove_batch_dim else []
            views += [lambda name, tensor: tensor.to(device)] if device is not None else []
            stored = Activations(stored, run.record, tuple(views))
        cached = (stored, self, not remove_batch_dim, run.masks, pos_slice, changed, run.mask, run.tokens)
        return out, ActivationCache(*cached)

    @contextmanager
    def with_interventions(self, interventions):
        """Interventions (see `gemmascope.interventions`; lists may be nested) are in effect inside the `with` block."""
        if not interventions:
            yield self
            return
        now = Progress()
        self.following.append(now)
        try:
            with self.hooks(fwd_hooks=hooks_of(self, interventions, now)):
                yield self
        finally:
            self.following.remove(now)

    def generate(self, input, max_new_tokens: int = 32, **kwargs):
        """Continues a prompt. See `gemmascope.generate.generate` for its arguments."""
        return generate(self, input, max_new_tokens, **kwargs)

    def save_pretrained(self, folder, **kwargs) -> None:
        """Writes config, safetensors and tokenizer as Hugging Face does. See `gemmascope.weights.save_pretrained`."""
        from gemmascope.weights import save_pretrained  # weights builds models, so it imports this package

        save_pretrained(self, folder, **kwargs)

    # Text and tokens

    def _need_tokenizer(self) -> Gemma4Tokenizer:
        if self.tokenizer is None:
            raise ValueError(
                f"{self.cfg.model_name} has no tokenizer: pass token ids, or load a folder that holds tokenizer.json."
            )
        return self.tokenizer

    def to_tokens(self, input: str | list[str], prepend_bos: bool | None = None, **kwargs) -> Int[Tensor, "batch pos"]:
        """Token ids of one text or several, with BOS as the tokenizer's rules say unless `prepend_bos` is given."""
        return self._need_tokenizer().to_tokens(input, prepend_bos=prepend_bos, **kwargs).to(self.cfg.device)

    def to_str_tokens(self, input, prepend_bos: bool | None = None) -> list[str] | list[list[str]]:
        """One string a token, of a text or of token ids [pos]; a list of those for several texts or [batch, pos]."""
        return self._need_tokenizer().to_str_tokens(input, prepend_bos=prepend_bos)

    def to_string(self, tokens) -> str | list[str]:
        """The text of token ids [pos], or the texts of [batch, pos]."""
        return self._need_tokenizer().to_string(tokens)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token. Raises ValueError when it is several."""
        return self._need_tokenizer().to_single_token(text)

    # Weights, by TransformerLens's names

    @property
    def adapter(self) -> SimpleNamespace:
        """Where transformer_lens.tools look for what follows the unembedding: the soft cap."""
        return SimpleNamespace(apply_output_logits_transform=self.softcap)

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        return self.embed.weight.new_zeros(self.cfg.d_vocab)  # Gemma 4 has no biases

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """The sum of all biases up to a layer: zero, Gemma 4 has none."""
        return self.embed.weight.new_zeros(self.cfg.d_model)

    def tokens_to_residual_directions(self, tokens) -> Float[Tensor, "*tokens d_model"]:
        """The direction whose dot product with the final normed stream is a token's logit before the soft cap."""
        if isinstance(tokens, str):
            tokens = self.to_single_token(tokens)
        return self.W_U.T[tokens]

    def kv_index(self, n_pos: int | None = None):
        """The rows [layer, (pos,) head] of the layers that own keys and values, as a pandas DataFrame.

        For the k and v sweeps of transformer_lens.patching, which otherwise suppose one number of kv heads: pass
        `index_axis_names=None, index_df=model.kv_index(n_pos)` to `get_act_patch_attn_head_k_by_pos`.
        """
        import pandas

        heads = {
            layer: range(shape.n_kv_heads) for layer, shape in enumerate(self.cfg.layers) if shape.kv_source is None
        }
        if n_pos is None:
            rows = [(layer, head) for layer in heads for head in heads[layer]]
            return pandas.DataFrame(rows, columns=["layer", "head"])
        rows = [(layer, pos, head) for layer in heads for pos in range(n_pos) for head in heads[layer]]
        return pandas.DataFrame(rows, columns=["layer", "pos", "head"])
