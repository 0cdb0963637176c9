"""More sparse features than dimensions, planted in a model's stream (after Elhage et al. 2022, arXiv 2209.10652): a
sparse autoencoder finds them again, and in the place of a hook point its latents are what can be ablated.

Each token's embedding is a sum of a few of 24 feature directions in 16 dimensions, with strengths of its own. Attention
and MLPs write nothing, so that the stream is this sum and a token's logit its product with the token's embedding.
"""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

import gemmascope as gs
from tests.ground_truth import by_hand

N_FEATURES, D_MODEL, N_TOKENS, N_LATENTS = 24, 16, 3000, 32
FIRST = 3
SITE = "blocks.0.hook_resid_post"


class SAE(nn.Module):
    """A tied sparse autoencoder: relu(x W^T + b) W, rows of W of length 1. Its latents are a hook point, hook_acts."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(N_LATENTS, D_MODEL), dim=1))
        self.bias = nn.Parameter(torch.zeros(N_LATENTS))
        self.hook_acts = HookPoint()

    def forward(self, x: Tensor) -> Tensor:
        acts = torch.relu(x @ self.weight.T + self.bias)
        return self.hook_acts(acts) @ self.weight

    def fit(self, data: Tensor, steps: int = 1500, sparsity: float = 0.3) -> "SAE":
        optimiser = torch.optim.Adam(self.parameters(), lr=1e-2)
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = 1e-2 * (1 - step / steps)
            x = data[torch.randint(len(data), (512,))]
            acts = torch.relu(x @ self.weight.T + self.bias)
            loss = ((acts @ self.weight - x) ** 2).sum(-1).mean() + sparsity * acts.sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                self.weight.copy_(nn.functional.normalize(self.weight, dim=1))
        return self


def built():
    """The model, the feature directions (as far apart as they go) and each token's strengths [token, feature]."""
    features = torch.randn(N_FEATURES, D_MODEL)
    for _ in range(300):  # push apart
        features = nn.functional.normalize(features, dim=1)
        near = (features @ features.T).fill_diagonal_(0)
        features = features - 0.1 * near.pow(3) @ features
    features = nn.functional.normalize(features, dim=1)
    active = torch.rand(N_TOKENS, N_FEATURES).argsort(-1) < torch.randint(1, 4, (N_TOKENS, 1))
    strengths = active * (0.5 + torch.rand(N_TOKENS, N_FEATURES))
    model = by_hand.blank(2, 1, D_MODEL, FIRST + N_TOKENS).float()
    rows = torch.zeros(FIRST + N_TOKENS, D_MODEL)
    rows[FIRST:] = strengths @ features
    by_hand.embed(model, rows)
    return model, features, strengths


@pytest.fixture(scope="module")
def planted():
    """The model, its features and strengths, the stream after each token alone, an SAE, and each feature's latent."""
    torch.manual_seed(0)
    model, features, strengths = built()
    stream = gs.collect(model, torch.arange(FIRST, FIRST + N_TOKENS)[:, None], SITE)[SITE]
    sae = SAE().fit(stream)
    return model, features, strengths, stream, sae, (sae.weight @ features.T).argmax(0).tolist()


def recovered(found: Tensor, features: Tensor) -> float:
    """Mean over features of the largest cosine with anything found."""
    return (nn.functional.normalize(found, dim=1) @ features.T).max(0).values.mean().item()


def test_the_features_are_found_again(planted):
    _, features, strengths, stream, sae, latents = planted
    torch.testing.assert_close(stream, strengths @ features, rtol=0, atol=1e-5)  # what was planted is what is there
    assert recovered(sae.weight, features) > 0.95 and len(set(latents)) == N_FEATURES
    acts = torch.relu(stream @ sae.weight.T + sae.bias)[:, latents]
    by_feature = [torch.corrcoef(torch.stack([acts[:, i], strengths[:, i]]))[0, 1] for i in range(N_FEATURES)]
    assert min(by_feature) > 0.9
    # Controls: as many random directions, principal components, and an SAE of a stream of the same covariance without
    # any sparse features in it.
    generator = torch.Generator().manual_seed(5)
    assert recovered(torch.randn(N_LATENTS, D_MODEL, generator=generator), features) < 0.7
    assert recovered(torch.linalg.svd(stream, full_matrices=False).Vh, features) < 0.7
    gaussian = (
        torch.randn(N_TOKENS, D_MODEL, generator=generator) @ torch.linalg.cholesky(stream.T @ stream / N_TOKENS).T
    )
    assert recovered(SAE().fit(gaussian).weight, features) < 0.8


def test_ablating_a_latent_takes_its_feature_out_of_what_the_model_says(planted):
    model, features, strengths, stream, sae, latents = planted
    model = copy.deepcopy(model)
    model.blocks[0].hook_resid_post = copy.deepcopy(sae)
    model.setup()
    name = f"{SITE}.hook_acts"
    pairs = ((strengths > 0.7).sum(-1) == 2) & ((strengths > 0).sum(-1) == 2)
    chosen = pairs.nonzero()[:, 0][:60]
    tokens = (chosen + FIRST)[:, None]
    logits, cache = model.run_with_cache(tokens)
    acts = torch.relu(stream[chosen] @ sae.weight.T + sae.bias)
    torch.testing.assert_close(cache[name][:, 0], acts.detach(), rtol=0, atol=1e-5)

    def said(logits: Tensor, of: list[int]) -> Tensor:
        """Mean strength, among the 20 likeliest tokens, of one feature a prompt."""
        likeliest = logits[:, -1, FIRST:].topk(20).indices
        return strengths[likeliest, torch.tensor(of)[:, None]].mean(-1)

    first, second = strengths[chosen].topk(2).indices.T.tolist()
    lost, kept = [], []
    for row, (one, other) in enumerate(zip(first, second, strict=True)):
        prompt = tokens[[row]]
        off = model(prompt, interventions=gs.zero(name, neurons=latents[one])).detach()
        lost.append(said(off, [one]))
        kept.append(said(off, [other]))
        absent = [latent for latent in range(N_LATENTS) if acts[row, latent] == 0]
        assert torch.equal(model(prompt, interventions=gs.zero(name, neurons=absent)), model(prompt))
    before = said(logits.detach(), first).mean(), said(logits.detach(), second).mean()
    # What is said had both features; it keeps the other one, and this one as rarely as any feature.
    assert min(before) > 0.5 and torch.cat(kept).mean() > 1
    assert torch.cat(lost).mean() < strengths.mean() + 0.1 < 0.2
