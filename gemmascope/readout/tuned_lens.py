"""The tuned lens: a logit lens that first translates each layer's stream into the last layer's terms.

Belrose et al., "Eliciting Latent Predictions from Transformers with the Tuned Lens" (2023, arXiv 2303.08112). Layer l's
translator is affine, starts as the identity, and is trained so that what it predicts is close to what the model does:

    h  ->  h + A_l h + rms(h) b_l,        loss_l = KL(final || lens_l).

The bias is in units of the stream's RMS (the paper's is not): Gemma 4's streams differ in size by layer, which the
final norm does not see, and so one learning rate serves all of them.
"""

import json
from pathlib import Path

import torch
from jaxtyping import Float, Int
from pandas import DataFrame
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from gemmascope import ops
from gemmascope.metrics import Answer
from gemmascope.progress import interruptible
from gemmascope.readout.lens import Lens, Stream, read, stream_names, unembedded
from gemmascope.results import Result, about, fingerprint


class TunedLens:
    """One affine translator for the embedding and for every block but the last, whose stream needs none.

    Untrained it is the logit lens. It takes n_layers * d_model**2 float32 numbers, and three times that while training.
    """

    def __init__(self, model):
        self.model = model
        n_layers, d_model, device = model.cfg.n_layers, model.cfg.d_model, model.cfg.device
        self.weights = [torch.zeros(d_model, d_model, device=device) for _ in range(n_layers)]
        self.biases = [torch.zeros(d_model, device=device) for _ in range(n_layers)]
        self.losses: list[list[float]] = []
        """KL in nats by training step and translator, each measured before its step."""

    def __repr__(self) -> str:
        return f"TunedLens({self.model.cfg.model_name}, {len(self.losses)} steps)"

    def translate(self, stream: Stream, layer: int) -> Stream:
        """A stream in the last layer's terms; `layer` -1 is the embedding."""
        if layer == self.model.cfg.n_layers - 1:
            return stream
        x = ops.wide(stream)
        weight, bias = (part[layer + 1].to(x.dtype) for part in (self.weights, self.biases))
        return (x + x @ weight.T + ops.rms(x, self.model.cfg.eps) * bias).type_as(stream)

    def read(
        self, prompt, target: Answer | None = None, *, positions: int | list[int] | None = None, top: int = 5
    ) -> Lens:
        """As `logit_lens`, through the translators."""
        return read(self.model, prompt, target, positions, top, self)

    # Training

    def fit(
        self, tokens, *, steps: int = 250, batch: int = 4, lr: float = 1e-3, window: int = 128, seed: int = 0
    ) -> "TunedLens":
        """Trains every translator by KL to the final distribution, with Adam and a rate that falls to 0 in a line.

        A keyboard interrupt ends the training early and keeps what was learned; a further call goes on from there.

        Args:
            tokens: ids [sequence, pos], or text or texts, which are cut into windows that start with BOS.
            batch: sequences a step, drawn with `seed`.
            window: tokens in a window of text.

        Returns:
            This lens.

        Raises:
            ValueError: for text shorter than a window, or a model whose output is NaN.
        """
        tokens = self._sequences(tokens, window)
        parameters = [*self.weights, *self.biases]
        adam = torch.optim.Adam(parameters, lr=lr)
        generator = torch.Generator().manual_seed(seed)
        try:
            with interruptible("the translators are those of the steps so far."):
                for step in tqdm(range(steps), desc="tuned lens", delay=1, leave=False):
                    drawn = tokens[torch.randint(len(tokens), (batch,), generator=generator)]
                    losses = self._gradients(drawn)
                    adam.param_groups[0]["lr"] = lr * (1 - step / steps)
                    adam.step()
                    self.losses.append(losses)
        finally:
            for parameter in parameters:
                parameter.grad = None
                parameter.requires_grad_(False)
        return self

    def _gradients(self, tokens: Int[Tensor, "sequence pos"]) -> list[float]:
        """Leaves every translator's gradient in it; one layer's logits exist at a time."""
        streams, final = self._streams(tokens)
        losses = []
        for layer, weight, bias in zip(streams, self.weights, self.biases, strict=True):
            weight.requires_grad_()
            bias.requires_grad_()
            with torch.enable_grad():
                loss = self._kl(streams[layer], layer, final).mean()
            if not loss.isfinite():
                raise ValueError(f"The KL of layer {layer} is {loss.item()}: the model's logits are not finite here.")
            weight.grad, bias.grad = torch.autograd.grad(loss, (weight, bias))
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def _streams(self, tokens: Int[Tensor, "sequence pos"]) -> tuple[dict[int, Stream], Tensor]:
        """The streams that have a translator, and the final log probabilities."""
        names = stream_names(self.model.cfg.n_layers)
        names.popitem()
        logits, cache = self.model.run_with_cache(tokens, names_filter=list(names.values()))
        return {layer: cache[name] for layer, name in names.items()}, ops.wide(logits).log_softmax(-1)

    def _kl(self, stream: Stream, layer: int, final: Tensor) -> Float[Tensor, "sequence pos"]:
        now = ops.wide(unembedded(self.model, self.translate(stream, layer))).log_softmax(-1)
        return F.kl_div(now, final, log_target=True, reduction="none").sum(-1)

    def _sequences(self, tokens, window: int) -> Int[Tensor, "sequence pos"]:
        if isinstance(tokens, Tensor):
            return self.model._begin(tokens).tokens
        tokenizer = self.model._need_tokenizer()
        texts = [tokens] if isinstance(tokens, str) else list(tokens)
        rows, longest = [], 0
        for text in texts:
            ids = tokenizer.encode(text, add_bos=False)
            longest = max(longest, len(ids) + 1)
            starts = range(0, len(ids) - window + 2, window - 1)
            rows += [[tokenizer.bos_token_id, *ids[start : start + window - 1]] for start in starts]
        if not rows:
            raise ValueError(
                f"No text fills a window of {window} tokens, the longest has {longest}: "
                "give more text or a smaller window."
            )
        return self.model._begin(torch.tensor(rows)).tokens

    @torch.no_grad()
    def kl(self, tokens, *, window: int = 128) -> Result:
        """How far each layer's prediction is from the model's own: KL(final || lens), the mean over positions.

        Cells are layers, samples are sequences. `TunedLens(model).kl(tokens)`, untrained, is the logit lens's.
        """
        tokens = self._sequences(tokens, window)
        columns = []
        for row in tokens.split(1):
            streams, final = self._streams(row)
            columns.append(torch.stack([self._kl(stream, layer, final).mean() for layer, stream in streams.items()]))
        said = about(self.model, trained_steps=len(self.losses), sequences=len(tokens))
        cells = DataFrame({"layer": list(streams)})
        return Result("lens: KL to the final distribution", cells, torch.stack(columns, 1).cpu(), "nats", about=said)

    # Files

    def save(self, folder: str | Path) -> None:
        """Writes tuned_lens.safetensors and manifest.json into a folder, which is made if it is not there."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {"weight": torch.stack(self.weights), "bias": torch.stack(self.biases)}
        save_file(tensors, folder / "tuned_lens.safetensors")
        manifest = about(self.model) | {"losses": self.losses}
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))

    @classmethod
    def load(cls, folder: str | Path, model) -> "TunedLens":
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: for a folder that holds no tuned lens.
            ValueError: for a lens that was trained on another model.
        """
        folder = Path(folder)
        if not (folder / "tuned_lens.safetensors").is_file() or not (folder / "manifest.json").is_file():
            raise FileNotFoundError(
                f"{folder} holds no tuned_lens.safetensors with a manifest.json: "
                "give a folder that TunedLens.save wrote."
            )
        manifest = json.loads((folder / "manifest.json").read_text())
        if manifest["fingerprint"] != fingerprint(model):
            raise ValueError(
                f"This lens was trained on {manifest['model']} with the fingerprint {manifest['fingerprint']}, and "
                f"{model.cfg.model_name} has {fingerprint(model)}: train one for this model."
            )
        lens = cls(model)
        tensors = load_file(folder / "tuned_lens.safetensors", device=str(model.cfg.device))
        lens.weights, lens.biases = list(tensors["weight"].unbind()), list(tensors["bias"].unbind())
        lens.losses = manifest["losses"]
        return lens
