"""Code that makes one of every view, in the names it finds in SETUP: for tests that hold of all views."""

PROMPT = "When Mary and John went to the store, John gave a book to"
SETUP = f"""
import gemmascope as gs
model = gs.load("nano-moe")
prompt = {PROMPT!r}
corrupted = {PROMPT.replace("John gave", "Mary gave")!r}
selection = gs.Selection()
names = ("Mary", "Anna", "John", "Tom")
texts = [f"When {{a}} and {{b}} went to the store, {{b}} gave a book to" for a in names for b in names if a != b]
first = [text.split()[1] in ("Mary", "Anna") for text in texts]
probes = gs.probe_layers(model, texts, first, positions=2, folds=3, progress=False)
"""
VIEWS = {
    "TokenStrip": "gs.token_strip(model, prompt, selection=selection)",
    "LensView": "gs.lens_view(model, prompt, selection=selection)",
    "AttentionView": "gs.attention_view(model, prompt, selection=selection)",
    "RouterView": "gs.router_view(model, prompt, selection=selection)",
    "AttributionView": "gs.attribution_view(model, prompt, ' Mary', ' John', selection=selection)",
    "AblationBench": "gs.ablation_bench(model, prompt, answers=(' Mary', ' John'), selection=selection)",
    "PatchGrid": "gs.patch_grid(model, prompt, corrupted, answers=(' Mary', ' John'), selection=selection)",
    "ProbeView": "probes.view(model=model, prompts=texts, selection=selection)",
    "UnitView": "gs.unit_view(model, 'blocks.3.mlp.hook_post', texts, neuron=36, selection=selection)",
    "ModelMap": "gs.model_map(model, prompt, selection=selection)",
}
