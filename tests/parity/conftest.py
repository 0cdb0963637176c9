"""The oracle: transformers' own Gemma 4, given the weights of one of our models."""

from collections.abc import Callable

import pytest
import torch

from gemmascope.model.text import HookedGemma4
from gemmascope.weights import hf_name


@pytest.fixture
def transformers_twin() -> Callable:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    def build(model: HookedGemma4, dtype: torch.dtype = torch.float32) -> Gemma4ForCausalLM:
        ours = ("architectures", "model_type", "dtype")
        raw = {key: value for key, value in model.cfg.to_hf().items() if key not in ours}
        cfg = Gemma4TextConfig(**raw, attn_implementation="eager", experts_implementation="eager")
        twin = Gemma4ForCausalLM(cfg).eval()
        weights = {f"model.{hf_name(name)}": tensor for name, tensor in model.state_dict().items()}
        keys = twin.load_state_dict(weights, strict=False)
        assert not keys.unexpected_keys and set(keys.missing_keys) <= {"lm_head.weight"}, keys
        twin.tie_weights()
        return twin.to(dtype)

    return build
