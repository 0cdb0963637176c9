"""Draws docs/kernels.svg, the README's chart, from the newest lines of results.csv: how many times faster than a peer.

python kernels/benchmarks/chart.py
"""

import csv
import math
from html import escape
from pathlib import Path

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "docs" / "kernels.svg"
ROWS = (
    ("attention_sliding", "forward", "S=16384 W=512 H=8 K=1 D=256", "Sliding attention, 16K tokens"),
    ("attention_sliding", "forward+backward", "S=4096 W=512 H=8 K=1 D=256", "The same with gradients, 4K"),
    ("attention_decode", "forward", "S=4096 H=8 K=1 D=512", "One new token, 4K context"),
    ("experts", "forward", "T=256 E=128 k=8 d=2816 m=704", "26B-A4B's experts, 256 tokens"),
    ("model_moe", "forward", "S=4096", "50 M mixture of experts, 4K"),
    ("model_edge", "forward", "S=4096", "Small edge model, 4K"),
    ("bridge_time", "run_with_cache", "S=4096", "run_with_cache, 4K tokens"),
    ("sweep_resid", "layer+pos", "64 tokens of nano-moe", "Patching every position, 64"),
)
"""(row, mode, shape, what it is called), in the order of the bars."""

STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328; } .peer { fill: #59636e; font-size: 12px; }
.bfloat16 { fill: #0072b2; } .float32 { fill: #e69f00; } .one { stroke: #59636e; stroke-dasharray: 3 3; }
@media (prefers-color-scheme: dark) {
  text { fill: #f0f6fc; } .peer { fill: #9198a1; } .bfloat16 { fill: #56b4e9; } .one { stroke: #9198a1; }
}
"""


def newest() -> dict[tuple, dict[str, dict]]:
    """{(row, mode, shape, dtype): {impl: its last line}}."""
    found: dict[tuple, dict[str, dict]] = {}
    with (HERE / "results.csv").open() as file:
        for line in csv.DictReader(file):
            found.setdefault((line["row"], line["mode"], line["shape"], line["dtype"]), {})[line["impl"]] = line
    return found


def bars() -> list[tuple[str, dict]]:
    """Each row's title, and the line of its fastest peer."""
    found, made = newest(), []
    for row, mode, shape, title in ROWS:
        for dtype in ("bfloat16", "float32"):
            peers = [line for line in found.get((row, mode, shape, dtype), {}).values() if line["ratio"]]
            if peers:
                made.append((title, min(peers, key=lambda line: float(line["ratio"]))))
    return made


def draw(made: list[tuple[str, dict]]) -> str:
    left, right, height = 215, 720, 24
    top = math.log2(max(float(line["ratio"]) for _, line in made)) + 0.1

    def x(ratio: float) -> float:
        return left + (right - left) * (math.log2(ratio) + 0.3) / (top + 0.3)

    parts = [f'<line class="one" x1="{x(1):.1f}" x2="{x(1):.1f}" y1="34" y2="{44 + height * len(made)}"/>']
    parts += [f'<text x="{x(1):.1f}" y="26" text-anchor="middle" class="peer">as fast</text>']
    for place, (dtype, offset) in enumerate((("bfloat16", 0), ("float32", 85))):
        parts.append(f'<rect class="{dtype}" x="{left + 330 + offset}" y="16" width="11" height="11"/>')
        parts.append(f'<text x="{left + 346 + offset}" y="26" class="peer">{("bfloat16", "float32")[place]}</text>')
    shown = ""
    for number, (title, line) in enumerate(made):
        dtype, peer, ratio = line["dtype"], line["impl"], float(line["ratio"])
        y = 40 + height * number
        if title != shown:
            parts.append(f'<text x="{left - 10}" y="{y + 15}" text-anchor="end">{escape(title)}</text>')
        shown = title
        start, end = sorted((x(1), x(ratio)))
        size = f'width="{max(end - start, 1):.1f}" height="{height - 8}"'
        parts.append(
            f'<rect class="{dtype}" x="{start:.1f}" y="{y + 3}" {size} rx="2"/>'
            f'<text x="{end + 6:.1f}" y="{y + 15}">{ratio:.3g}x <tspan class="peer">{escape(peer)}</tspan></text>'
        )
    bottom = 60 + height * len(made)
    where = "; ".join(sorted({f"{line['device']}, {line['date']}, torch {line['torch']}" for _, line in made}))
    parts.append(
        f'<text x="0" y="{bottom}" class="peer">{escape(where)}; the fastest peer of each row; log scale.</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 {bottom + 10}" role="img">'
        f"<title>How many times faster than the fastest peer</title><style>{STYLE}</style>{''.join(parts)}</svg>\n"
    )


if __name__ == "__main__":
    CHART.write_text(draw(bars()))
    print(f"wrote {CHART}")
