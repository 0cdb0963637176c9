"""The command line: `gemmascope lab | models | explore | routing | verify | doctor`.

Heavy libraries are imported inside the commands, so that `gemmascope --help` answers at once. What a user can get wrong
(a path, a name, a device) ends as one sentence on stderr and exit code 2; set GEMMASCOPE_DEBUG=1 for the traceback.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from itertools import chain, starmap
from pathlib import Path
from urllib.parse import quote

import gemmascope

PACKAGE = Path(__file__).parent
DTYPES = ("float32", "bfloat16", "float16")
FIRST_NOTEBOOK = "01_first_look"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is 0 when done, 1 when `verify` found a difference, 2 for a request in error."""
    argv = list(sys.argv[1:] if argv is None else argv)
    # Everything after `lab ... --` is JupyterLab's, so argparse never sees it.
    cut = argv.index("--") if argv[:1] == ["lab"] and "--" in argv else len(argv)
    args = _parser().parse_args(argv[:cut])
    args.lab_args = argv[cut + 1 :]
    try:
        return args.command(args)
    except (ValueError, KeyError, OSError, MemoryError) as error:
        if os.environ.get("GEMMASCOPE_DEBUG"):
            raise
        print(f"gemmascope: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gemmascope", description="Look inside Gemma 4.")
    parser.add_argument("--version", action="version", version=f"gemmascope {gemmascope.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    lab = commands.add_parser(
        "lab",
        help="open a notebook in JupyterLab",
        usage="gemmascope lab [NOTEBOOK] [-- JUPYTERLAB_ARGS ...]",
        epilog="What follows -- goes to JupyterLab, as in: gemmascope lab -- --no-browser --port=8899",
    )
    lab.add_argument(
        "notebook", nargs="?", metavar="NOTEBOOK", default=FIRST_NOTEBOOK, help="name or path (default: %(default)s)"
    )
    lab.set_defaults(command=_lab)

    models = commands.add_parser("models", help="list the shipped models and the Gemma 4 checkpoints on this machine")
    models.set_defaults(command=_models)

    explore = commands.add_parser("explore", help="write one self-contained interactive page about a prompt")
    explore.add_argument("prompt")
    explore.add_argument("-o", "--output", required=True, metavar="PAGE.html")
    explore.add_argument("--model", default="nano-moe", help="shipped name, hub id or folder (default: %(default)s)")
    explore.set_defaults(command=_explore)

    routing = commands.add_parser(
        "routing",
        help="write one self-contained page about what a model's experts do on texts, and whether it matters",
        epilog="Without --label, the texts of each of several files are labelled with the file's name.",
    )
    routing.add_argument("model", metavar="MODEL", help="shipped name, hub id or folder")
    routing.add_argument("texts", metavar="TEXTS", nargs="+", help=".txt (a text a line), .jsonl, .csv or .parquet")
    routing.add_argument("-o", "--output", required=True, metavar="PAGE.html")
    routing.add_argument("--column", default="text", help="where the texts are (default: %(default)s)")
    routing.add_argument("--label", metavar="COLUMN", help="what a text is of, its domain say")
    routing.add_argument(
        "--hub", action="store_true", help="TEXTS are data sets on the Hugging Face hub, NAME or NAME:CONFIGURATION"
    )
    routing.add_argument("--split", default="train", help="of a data set on the hub (default: %(default)s)")
    routing.add_argument("--max-texts", type=_positive, metavar="N", help="read no more than these")
    routing.add_argument(
        "--sample",
        type=_positive,
        metavar="N",
        default=128,
        help="texts effects are measured on (default: %(default)s)",
    )
    routing.add_argument("--no-causal", action="store_true", help="statistics only, which is faster and says less")
    routing.add_argument("--dtype", choices=DTYPES, help="default: the checkpoint's own")
    routing.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    routing.set_defaults(command=_routing)

    verify = commands.add_parser(
        "verify",
        help="compare a checkpoint with transformers, layer by layer",
        description="Run a checkpoint with gemmascope, then with transformers, one in memory at a time, and compare.",
    )
    verify.add_argument("path", help="shipped name, hub id in the local cache, or folder")
    verify.add_argument("--prompt", help="text to compare on (default: one that is longer than the sliding window)")
    verify.add_argument("--dtype", choices=DTYPES, default="float32")
    verify.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1, mps (default: %(default)s)")
    verify.set_defaults(command=_verify)

    doctor = commands.add_parser("doctor", help="show versions, devices, and what will run where")
    doctor.set_defaults(command=_doctor)
    return parser


def _device(name: str) -> str:
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name!r} is not a device; it is cpu, cuda, cuda:NUMBER or mps")
    return name


def _positive(number: str) -> int:
    if not re.fullmatch(r"0*[1-9]\d*", number):
        raise argparse.ArgumentTypeError(f"{number!r} is not a number from 1 on")
    return int(number)


def _sentence(error: BaseException) -> str:
    """What went wrong, in words only."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    if isinstance(error, KeyError) and error.args:
        return str(error.args[0])  # str() of a KeyError would put the sentence in quotes
    return str(error) or type(error).__name__


# ---------------------------------------------------------------------------------------------------- lab


def _lab(args: argparse.Namespace) -> int:
    notebook = _find_notebook(args.notebook).resolve()
    from jupyterlab.labapp import LabApp

    LabApp.launch_instance(
        [
            f"--ServerApp.root_dir={notebook.parent}",
            # Not the notebook as an argument: then only the browser it opens would know, not the address it prints.
            f"--LabApp.default_url=/lab/tree/{quote(notebook.name)}",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",  # nobody is asked over the network
            *args.lab_args,  # the user's come last, and win
        ]
    )
    return 0


def _find_notebook(name: str) -> Path:
    """A path as given, or the name of a notebook of the checkout, with or without its ending.

    Raises:
        FileNotFoundError: naming the notebooks there are, or, where none is installed, where to get them.
    """
    if Path(name).is_file():
        return Path(name)
    folders = (PACKAGE.parent / "notebooks", Path("notebooks"))
    shipped = {path.stem: path for folder in folders for path in sorted(folder.glob("*.ipynb"))}
    if not shipped:
        raise FileNotFoundError(
            "The notebooks are in gemmascope's source checkout, not in the installed package: "
            "run this from a checkout, or give the path of a notebook."
        )
    stem = name.removesuffix(".ipynb")
    if stem in shipped:
        return shipped[stem]
    near = difflib.get_close_matches(stem, shipped, n=3) or list(shipped)
    raise FileNotFoundError(f"There is no notebook {name!r}; the nearest are {', '.join(near)}.")


# ------------------------------------------------------------------------------------------------- models


def _models(args: argparse.Namespace) -> int:
    shipped = [(path.parent.name, path.parent) for path in sorted(PACKAGE.glob("zoo/*/config.json"))]
    cached = _cached_checkpoints()
    print("Shipped with gemmascope\n")
    _print_models(shipped)
    print(f"\nGemma 4 checkpoints in the local Hugging Face cache ({_hub_cache()})\n")
    _print_models(cached)
    print('\nOpen one with gemmascope.load("NAME").')
    return 0


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)


def _cached_checkpoints() -> list[tuple[str, Path]]:
    """(hub id, folder of its newest snapshot) of every Gemma 4 in the hub cache, without touching the network."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir(_hub_cache()).repos
    except CacheNotFound:
        return []
    newest = {
        repo.repo_id: max(repo.revisions, key=lambda revision: revision.last_modified).snapshot_path
        for repo in repos
        if repo.repo_type == "model" and repo.revisions
    }
    return [(name, folder) for name, folder in sorted(newest.items()) if _is_gemma4(folder)]


def _is_gemma4(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):  # no config, or another project's file: not a model to list
        return False
    return isinstance(config, dict) and str(config.get("model_type")).startswith("gemma4")


def _print_models(models: list[tuple[str, Path]]) -> None:
    if not models:
        print("  none")
        return
    print(_table([("model", "parameters", "on disk", "layers", "experts"), *starmap(_model_row, models)]))


def _model_row(name: str, folder: Path) -> tuple[str, ...]:
    from gemmascope.config import Gemma4Config

    files = sorted(folder.glob("*.safetensors"))
    size = _bytes(sum(file.stat().st_size for file in files)) if files else "no weights"
    try:
        cfg = Gemma4Config.from_hf(json.loads((folder / "config.json").read_bytes()))
        parameters = _count(sum(map(_elements, files)))
    except (ValueError, KeyError) as error:  # a relative gemmascope does not compute, or a damaged file
        return (name, "-", size, "-", f"cannot be opened: {_sentence(error)}")
    experts = f"{cfg.n_experts}, {cfg.experts_per_token} a token" if cfg.n_experts else "-"
    return (name, parameters, size, str(cfg.n_layers), experts)


def _elements(file: Path) -> int:
    """Numbers stored in a safetensors file, read from its header: 8 bytes of length, then JSON."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(min(length, file.stat().st_size)))  # a damaged file may name any length
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


# ------------------------------------------------------------------------------- explore, routing, verify


def _explore(args: argparse.Namespace) -> int:
    from gemmascope.views.dashboard import dashboard, views_of
    from gemmascope.weights import load

    output = _output(args.output)
    model = load(args.model)
    views = [name for name in views_of(model) if name != "ablation_bench"]  # which is nothing without a kernel
    dashboard(model, args.prompt, views=views).to_html(output)
    print(f"Wrote {output} ({_bytes(output.stat().st_size)}); open it in a browser.")
    return 0


def _output(name: str) -> Path:
    """Said before the model loads, not after."""
    output = Path(name)
    if not output.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {output.parent} to write {output.name} in.")
    return output


def _routing(args: argparse.Namespace) -> int:
    from gemmascope.routing.corpus import TextFiles, hub_texts
    from gemmascope.routing.report import report
    from gemmascope.routing.sample import in_step
    from gemmascope.weights import load

    output = _output(args.output)
    model = load(args.model, device=args.device, dtype=args.dtype)
    files = TextFiles([] if args.hub else args.texts, args.column, args.label)
    of_hub = chain.from_iterable(hub_texts(name, args.split, args.column, args.label) for name in args.texts)
    rows = of_hub if args.hub else files
    labelled = args.label is not None or len(args.texts) > 1
    texts, labels = in_step(rows) if labelled else ((text for text, _ in rows), None)
    limits = dict(max_texts=args.max_texts, sample=args.sample, causal=not args.no_causal)
    made = report(model, texts, labels, **limits)
    made.to_html(output)
    print("\n".join(made.findings))
    if files.trouble:
        print(f"{len(files.trouble)} of {len(args.texts)} files could not be read, or not to the end.", file=sys.stderr)
    print(f"Wrote {output} ({_bytes(output.stat().st_size)}); open it in a browser.")
    return 0


def _verify(args: argparse.Namespace) -> int:
    from gemmascope.verify import verify

    report = verify(args.path, prompt=args.prompt, dtype=args.dtype, device=args.device)
    print(report)
    return 0 if report.passed else 1


# ------------------------------------------------------------------------------------------------- doctor


def _doctor(args: argparse.Namespace) -> int:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    devices = _devices()
    mode = "offline, HF_HUB_OFFLINE is set" if HF_HUB_OFFLINE else "online, a hub id not in the cache is downloaded"
    sections = {
        "Versions": _versions(),
        "Devices": devices,
        "What runs where (GEMMASCOPE_OPS overrides)": [row for device, _ in devices for row in _choices(device)],
        "Hugging Face": [("cache", str(_hub_cache())), ("mode", mode)],
    }
    print("\n\n".join(f"{title}\n\n{_table(rows)}" for title, rows in sections.items()))
    return 0


def _versions() -> list[tuple[str, str]]:
    import platform
    from importlib import metadata

    rows = [("python", platform.python_version()), ("gemmascope", gemmascope.__version__)]
    for name in ("torch", "transformers", "transformer-lens", "triton", "safetensors", "anywidget", "jupyterlab"):
        try:
            rows.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _devices() -> list[tuple[str, str]]:
    """(name torch takes, description), the CPU first."""
    import psutil
    import torch

    def free_of(free: int, total: int) -> str:
        return f"{_bytes(free)} of {_bytes(total)} memory free"

    memory = psutil.virtual_memory()
    rows = [("cpu", f"{torch.get_num_threads()} threads, {free_of(memory.available, memory.total)}")]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory = free_of(*torch.cuda.mem_get_info(index))
        rows.append((f"cuda:{index}", f"{torch.cuda.get_device_name(index)}, capability {major}.{minor}, {memory}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple GPU, shares the CPU's memory"))
    return rows


def _choices(device: str) -> list[tuple[str, ...]]:
    """(device, operation, dtypes, what runs and why), dtypes that run alike in one row."""
    from gemmascope import ops

    alike: dict[tuple[str, str], list[str]] = {}
    for dtype in DTYPES:
        for operation, sentence in ops.describe(device, dtype).items():
            alike.setdefault((operation, sentence), []).append(dtype)
    return sorted((device, operation, ", ".join(dtypes), sentence) for (operation, sentence), dtypes in alike.items())


# ------------------------------------------------------------------------------------------------ writing


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, indented by two."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() for row in rows
    )


def _bytes(n: int) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def _count(n: int) -> str:
    return f"{n / 1e9:.2f} B" if n >= 1e9 else f"{n / 1e6:.2f} M"


if __name__ == "__main__":
    sys.exit(main())
