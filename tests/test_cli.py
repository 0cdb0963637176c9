import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gemmascope
import gemmascope.verify
from gemmascope.cli import main
from gemmascope.testing import ARCHITECTURES, tiny_config

COMMANDS = ("lab", "models", "explore", "routing", "verify", "doctor")


VISION = {
    "gemma4": dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2, head_dim=8)
    | dict(num_key_value_heads=2, global_head_dim=8, position_embedding_size=8),
    "gemma4_unified": dict(mm_embed_dim=48, output_proj_dims=48, mm_posemb_size=8),
}


def make_checkpoint(folder: Path, architecture: str, multimodal: str | None = None) -> Path:
    """A tiny checkpoint written by transformers, every norm and scale away from 1; a text model, or one with eyes."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = tiny_config(architecture).to_hf()
    if multimodal is not None:
        text = config | {"model_type": f"{multimodal}_text"}
        vision = VISION[multimodal] | {"model_type": f"{multimodal}_vision"}
        config = {"model_type": multimodal, "text_config": text, "vision_config": vision, "audio_config": None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if "norm" in name or name.endswith(("layer_scalar", "router.scale", "per_expert_scale")):
                tensor.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def moe_checkpoint(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    return make_checkpoint(tmp_path_factory.mktemp("checkpoints") / "moe", "26B-A4B")


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def add_to_cache(hub_cache: Path, repo: str, config: str) -> Path:
    snapshot = hub_cache / f"models--{repo.replace('/', '--')}" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(config)
    return snapshot


# Every command


def test_help_is_light(modules_after):
    loaded = modules_after("import gemmascope.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass")
    assert "gemmascope" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "transformer_lens", "jupyterlab", "huggingface_hub"}


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    shown = capsys.readouterr().out
    assert all(command in shown for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    assert command in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"gemmascope {gemmascope.__version__}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["verify", "no-such-model"], "No model 'no-such-model'"),
        (["explore", "Hello", "-o", "no/such/folder/page.html"], "There is no folder no/such/folder"),
        (["explore", "Hello", "-o", "page.html", "--model", "nano-mow"], "No model 'nano-mow'"),
        (["routing", "nano-edge", "a.txt", "-o", "page.html"], "nano-edge is dense"),
        (["routing", "nano-edge", "a.txt", "-o", "page.html"], "Models that route: nano-moe, google/gemma-4-26B-A4B"),
        (["routing", "nano-moe", "a.txt", "-o", "no/page.html"], "There is no folder no"),
        (["routing", "nano-moe", "none.txt", "-o", "page.html"], "none.txt: No such file"),
        (["routing", "nano-moe", "none.txt", "-o", "page.html"], "the corpus is empty"),
        (["lab", "01_first_lok"], "There is no notebook '01_first_lok'; the nearest are 01_first_look"),
    ],
)
def test_a_request_in_error_is_one_sentence_and_exit_2(argv, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert said in err
    assert "Traceback" not in err
    assert not out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "line",
    ["", "vrify", "verify x --dtype int8", "verify x --device gpu", "explore Hello", "routing nano-moe a.txt"]
    + ["routing nano-moe a.txt -o b.html --sample 0"],
)
def test_wrong_usage_exits_2(line):
    with pytest.raises(SystemExit, match="2"):
        main(line.split())


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("GEMMASCOPE_DEBUG", "1")
    with pytest.raises(FileNotFoundError):
        main(["verify", "no-such-model"])


# lab


def test_lab_opens_the_notebook_and_hands_arguments_on(monkeypatch):
    seen = []
    monkeypatch.setattr("jupyterlab.labapp.LabApp.launch_instance", seen.append)
    assert main(["lab", "--", "--no-browser", "--port=8899"]) == 0
    assert "--LabApp.default_url=/lab/tree/01_first_look.ipynb" in seen[0]
    assert seen[0][-2:] == ["--no-browser", "--port=8899"]


def test_lab_opens_a_notebook_of_ones_own(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("jupyterlab.labapp.LabApp.launch_instance", seen.append)
    (tmp_path / "my notes.ipynb").write_text("{}")
    main(["lab", str(tmp_path / "my notes.ipynb")])
    assert f"--ServerApp.root_dir={tmp_path}" in seen[0]
    assert "--LabApp.default_url=/lab/tree/my%20notes.ipynb" in seen[0]


def test_lab_without_notebooks_says_where_they_are(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gemmascope.cli.PACKAGE", tmp_path / "site-packages" / "gemmascope")
    assert main(["lab"]) == 2
    assert "source checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_lab_serves_the_notebook(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    env = os.environ | {place: str(tmp_path / place) for place in places}
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--IdentityProvider.token=t"]
    command = [sys.executable, "-m", "gemmascope.cli", "lab", "--", "--allow-root", *options]
    with (tmp_path / "log").open("w") as log, subprocess.Popen(command, env=env, stderr=log, cwd=tmp_path) as server:
        try:
            found = ask(f"http://127.0.0.1:{port}/api/contents/01_first_look.ipynb?token=t", server)
        finally:
            server.terminate()
    assert found["type"] == "notebook"
    assert "/lab/tree/01_first_look.ipynb" in (tmp_path / "log").read_text()


def ask(url: str, server: subprocess.Popen) -> dict:
    """The JSON at an address of a server that may still be starting."""
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url) as answer:
                return json.load(answer)
        except urllib.error.URLError:
            time.sleep(0.25)
    raise TimeoutError(url)


# models


def test_models_lists_the_shipped_ones(hub_cache, capsys):
    assert main(["models"]) == 0
    shipped, cached = capsys.readouterr().out.split("Gemma 4 checkpoints")
    assert "nano-moe" in shipped
    assert "nano-edge" in shipped
    assert "none" in cached


def test_models_lists_gemma4_checkpoints_in_the_cache(hub_cache, moe_checkpoint, capsys):
    config = json.loads((moe_checkpoint / "config.json").read_text())
    snapshot = add_to_cache(hub_cache, "google/gemma-4-tiny", json.dumps(config))
    (snapshot / "model.safetensors").write_bytes((moe_checkpoint / "model.safetensors").read_bytes())
    add_to_cache(hub_cache, "google/gemma-4-config-only", json.dumps(config))
    add_to_cache(hub_cache, "someone/quantized", json.dumps(config | {"quantization_config": {"bits": 4}}))
    add_to_cache(hub_cache, "someone/llama", json.dumps({"model_type": "llama"}))
    add_to_cache(hub_cache, "someone/broken", "{")
    assert main(["models"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "/" in line]
    rows = {line.split()[0]: line for line in lines}
    assert "6       8, 3 a token" in rows["google/gemma-4-tiny"]
    assert f"{(snapshot / 'model.safetensors').stat().st_size / 1e6:.1f} MB" in rows["google/gemma-4-tiny"]
    assert "no weights" in rows["google/gemma-4-config-only"]
    assert "cannot be opened" in rows["someone/quantized"]
    assert "someone/llama" not in rows
    assert "someone/broken" not in rows


# doctor


def test_doctor_says_what_runs_where(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert f"torch             {torch.__version__}" in shown
    assert "memory free" in shown
    for word in ("attention", "experts", "float32", "bfloat16", "offline"):
        assert word in shown


# explore


def test_explore_writes_one_page(tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["explore", "The <b>bold</b> cat", "-o", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<html" in text
    assert "<b>bold</b>" not in text


# routing


def test_routing_writes_one_page(tmp_path, capsys):
    (tmp_path / "gifts.txt").write_text("When Mary and John went to the store, John gave a book to Mary.\n" * 3)
    (tmp_path / "facts.txt").write_text("The capital of Norland is\n\n")
    (tmp_path / "bad.csv").write_text("body\nnothing\n")
    page = tmp_path / "page.html"
    texts = [str(tmp_path / name) for name in ("gifts.txt", "bad.csv", "facts.txt")]
    assert main(["routing", "nano-moe", *texts, "-o", str(page), "--sample", "2"]) == 0
    out, err = capsys.readouterr()
    assert "of 4 texts" in out and "Of the 2 labels" in out and "On 2 texts drawn at random" in out
    assert f"Wrote {page}" in out
    assert "bad.csv: There is no column 'text'; there are body." in err
    assert "1 of 3 files could not be read" in err
    assert "<html" in page.read_text(encoding="utf-8")


def test_routing_asks_the_hub_only_when_told(tmp_path, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("datasets.load_dataset", lambda name, *args, **kwargs: asked.append(name) or [{"text": "code"}])
    page = ["-o", str(tmp_path / "page.html"), "--no-causal"]
    assert main(["routing", "nano-moe", "some/set", *page]) == 2
    assert not asked
    assert main(["routing", "nano-moe", "some/set", "--hub", *page]) == 0
    assert asked == ["some/set"]
    assert "No effect was measured" in capsys.readouterr().out


# verify


@pytest.fixture(scope="module")
def report(moe_checkpoint) -> gemmascope.verify.VerifyReport:
    return gemmascope.verify.verify(moe_checkpoint)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_verify_passes(architecture, tmp_path, capsys):
    folder = make_checkpoint(tmp_path / "model", architecture)
    assert main(["verify", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[-1] == "PASS: every figure is within its limit for float32."
    layers = tiny_config(architecture).n_layers
    assert all(f"blocks.{layer} " in shown for layer in range(layers))


@pytest.mark.parametrize(("architecture", "multimodal"), [("26B-A4B", "gemma4"), ("12B", "gemma4_unified")])
def test_verify_compares_the_text_part_of_a_multimodal_checkpoint(architecture, multimodal, tmp_path):
    assert gemmascope.verify.verify(make_checkpoint(tmp_path / "model", architecture, multimodal)).passed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_verify_passes_in_half_precision(dtype, moe_checkpoint):
    half = gemmascope.verify.verify(moe_checkpoint, dtype=dtype)
    assert half.passed, str(half)
    assert half.rows[-1].alone > 1e-4  # its rounding is in the figures, or float32 was compared


def change(monkeypatch, edit) -> None:
    """Has gemmascope's side of the comparison load a model that differs from the checkpoint."""
    load = gemmascope.verify.load

    def changed(*args, **kwargs):
        model = load(*args, **kwargs)
        with torch.no_grad():
            edit(model)
        return model

    monkeypatch.setattr(gemmascope.verify, "load", changed)


def test_verify_names_the_layer_that_departs(moe_checkpoint, monkeypatch, capsys):
    change(monkeypatch, lambda model: model.blocks[2].attn.o_proj.weight[3].mul_(1.1))
    assert main(["verify", str(moe_checkpoint)]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("FAIL: blocks.2 departs")
    assert "blocks.3" not in verdict  # each layer is measured on one input, so those after it are not blamed


def test_verify_tells_a_wrong_router_from_a_near_tie(moe_checkpoint, monkeypatch):
    change(monkeypatch, lambda model: model.blocks[4].moe.router.proj.weight.neg_())
    wrong = gemmascope.verify.verify(moe_checkpoint)
    assert wrong.verdict.startswith("FAIL: blocks.4 chooses other experts")
    rows = {row.name: row for row in wrong.rows}
    assert rows["blocks.4"].same_experts < 1
    assert rows["blocks.3"].same_experts == 1


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda model: model.embed.weight.mul_(1.01), "FAIL: embed departs"),
        (lambda model: model.ln_final.weight.mul_(1.5), "FAIL: the logits differ"),
        (lambda model: model.blocks[1].ln1.weight.fill_(torch.nan), "FAIL: blocks.1"),
    ],
    ids=["embedding", "head", "nan"],
)
def test_verify_sees_what_is_wrong(edit, said, moe_checkpoint, monkeypatch):
    change(monkeypatch, edit)
    assert gemmascope.verify.verify(moe_checkpoint).verdict.startswith(said)


def test_verify_holds_one_model_at_a_time(moe_checkpoint, monkeypatch):
    ours = []
    change(monkeypatch, lambda model: ours.append(weakref.ref(model)))
    load_reference = gemmascope.verify._load_reference

    def checked(*args):
        assert ours[0]() is None
        return load_reference(*args)

    monkeypatch.setattr(gemmascope.verify, "_load_reference", checked)
    assert gemmascope.verify.verify(moe_checkpoint).passed


def test_verify_crosses_the_window(report):
    assert report.n_tokens > tiny_config("26B-A4B").window


def test_verify_reads_only_dtypes_it_has_limits_for(moe_checkpoint):
    with pytest.raises(ValueError, match="int8.*float32, bfloat16, float16"):
        gemmascope.verify.verify(moe_checkpoint, dtype="int8")


@pytest.mark.parametrize(
    "figure", [{"logits_error": torch.nan}, {"kl": 0.1}, {"same_argmax": 0.99}, {"same_greedy": 0.5}, "alone", "margin"]
)
def test_every_figure_has_a_limit(figure, report):
    if isinstance(figure, str):
        figure = {"rows": (*report.rows[:-1], report.rows[-1]._replace(**{figure: 1.0}))}
    worse = replace(report, **figure)
    assert report.passed
    assert len(worse.failures) == 1
    assert str(worse).splitlines()[-1] == worse.verdict
    assert worse.verdict.startswith("FAIL")
