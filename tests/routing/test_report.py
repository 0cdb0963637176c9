"""The report: its tables are what the single functions give, its page stands alone, and Ctrl-C leaves what there is."""

import io
import math
import random
import re

import pandas
import pytest
import torch
from scipy.stats import spearmanr

import gemmascope as gs
from gemmascope import progress
from gemmascope.experiments import sweep
from gemmascope.readout import activations
from gemmascope.readout.activations import Prompts
from gemmascope.routing import counts, effects, page, trace
from gemmascope.routing import statistics as S
from gemmascope.routing.report import CELL, STATISTICS, report
from gemmascope.routing.sample import Sample
from gemmascope.testing import tiny_model
from gemmascope.zoo.corpus import LANGUAGES, Corpus

QUIET = dict(progress=False)


@pytest.fixture(scope="module")
def nano():
    return gs.load("nano-moe")


@pytest.fixture(scope="module")
def languages(nano):
    rng, corpus = random.Random(5), Corpus(nano.tokenizer.backend)
    drawn = [(nano.tokenizer.decode(corpus.document(rng, name).ids[1:]), name) for _ in range(5) for name in LANGUAGES]
    return tuple(zip(*drawn, strict=True))


@pytest.fixture(scope="module")
def made(nano, languages):
    return report(nano, *languages, sample=6, **QUIET)


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("26B-A4B", n_layers=2, layer_kinds=("sliding", "global"))


def rows(n, length=9):
    return [torch.randint(3, 101, (length + i % 3,), generator=torch.Generator().manual_seed(i)) for i in range(n)]


def test_statistics_stand_beside_effects_by_default(made, nano, languages):
    assert len(made.experts) == nano.cfg.n_layers * nano.cfg.n_experts
    assert {*STATISTICS, "loss", "low", "high", "kl", "random expert", "matched load", "estimate"} <= set(made.experts)
    assert not made.experts[["loss", "matched load", "random expert", "estimate"]].isna().any().any()
    counts = gs.count_routing(nano, *languages, **QUIET)
    assert made.experts["load"].tolist() == pytest.approx(S.load(counts).flatten().tolist())
    assert made.layers["nmi"].tolist() == pytest.approx(S.nmi(counts).tolist())
    assert (made.n_texts, made.n_sampled, made.counts.n_tokens) == (20, 6, counts.n_tokens)


def test_effects_are_those_of_the_sample(tiny):
    texts = sorted(rows(4, length=7), key=len)  # as they are read
    made = report(tiny, texts, sample=4, max_experts=5, **QUIET)
    tokens = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    mask = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in texts])[:, None]
    done = made.experts.dropna(subset="loss")
    chosen = sorted(set(done["expert"]))
    assert len(chosen) == 2 and len(done) == 2 * tiny.cfg.n_layers  # 5 experts over 2 layers: two a layer
    effect = gs.expert_ablation(tiny, Prompts(tokens, mask), experts=chosen, **QUIET).table
    columns = [*CELL, "loss", "kl", "random expert", "matched load"]
    pandas.testing.assert_frame_equal(done[columns].reset_index(drop=True), effect[columns], atol=1e-6)
    assert done["excess"].tolist() == pytest.approx((effect["loss"] - effect["matched load"]).tolist(), abs=1e-6)
    assert {"none", "wrong", "first_only", "silenced"} <= set(made.layers)
    assert made.layers["silenced"].tolist() == pytest.approx(effect.groupby("layer")["loss"].mean().tolist(), abs=1e-6)
    assert "label" not in made.experts and made.similarity.empty and "nmi" not in made.layers


def test_correlations_are_spearmans(made):
    table = made.correlations.set_index(["statistic", "of"])
    for of, column in (("effect", "loss"), ("effect beyond matched load", "excess")):
        for statistic in ("load", "norm", "estimate"):
            row, both = table.loc[(statistic, of)], made.experts[["layer", statistic, column]].dropna()
            assert row["spearman"] == pytest.approx(spearmanr(both[statistic], both[column])[0])
            assert row["low"] < row["spearman"] < row["high"] and row["n"] == len(both) > 20
            by_layer = [spearmanr(part[statistic], part[column])[0] for _, part in both.groupby("layer")]
            assert row["within_layers"] == pytest.approx(sum(by_layer) / len(by_layer))
    assert "do not predict causal importance (arXiv 2606.10703)" in made.findings[-1]
    best = made.correlations.query("statistic != 'estimate' and of == 'effect'").set_index("statistic")["spearman"]
    assert (
        f"{best.abs().idxmax()} goes best with the effect: Spearman {best[best.abs().idxmax()]:.2f}"
        in made.findings[-1]
    )


def test_labels_have_their_own_effects(made):
    table = made.domains.set_index(["label", *CELL])
    assert set(made.domains["label"]) == set(LANGUAGES)
    assert table.loc[("tavi", 3, 4), "loss"] > table.loc[("kelo", 3, 4), "loss"]  # tavi's own expert: the model's card
    row = made.experts.query("layer == 3 and expert == 4").iloc[0]
    assert row["label"] == "tavi" and row["lift"] == made.domains.query("layer == 3 and expert == 4")["lift"].max()
    similarity = made.similarity.to_numpy()
    assert (similarity.diagonal() < 1e-9).all() and (similarity == similarity.T).all() and similarity.max() > 0.01


def test_words_and_pairs(made, nano):
    first = made.words.iloc[0]
    found = S.expert_vocabulary(made.counts, *map(int, first[CELL]), min_count=made._min_count)
    assert first["reads"].startswith(found["token"][0].replace(" ", "·"))
    assert made.leading.iloc[0][CELL].tolist() == first[CELL].tolist()
    pair = made.pairs.iloc[0]
    assert (made.pairs["expert"] < made.pairs["other"]).all() and made.pairs["lift"].is_monotonic_decreasing
    lift = S.coactivation(made.counts).lift[int(pair["layer"]), int(pair["expert"]), int(pair["other"])]
    assert pair["lift"] == pytest.approx(float(lift))


def test_without_the_causal_part_it_says_so(tiny):
    made = report(tiny, rows(3), causal=False, **QUIET)
    assert made.silenced is None and "loss" not in made.experts and made.correlations.empty
    assert "nothing here says which experts matter" in made.findings[-1]
    assert made.profile is not None and "scatter" not in made.plots
    assert "no causal part" in made._repr_html_()
    assert all(isinstance(table, pandas.DataFrame) for table in made.tables.values())


def test_ctrl_c_keeps_what_there_is(tiny, capsys, monkeypatch):
    def texts():
        yield from rows(16)
        yield rows(1)[0]
        raise KeyboardInterrupt

    made = report(tiny, texts(), batch_size=1, causal=False, **QUIET)
    assert made.counts.n_tokens == sum(map(len, rows(16)))
    assert f"{made.counts.n_tokens} tokens counted so far" in capsys.readouterr().out
    assert "Counting was interrupted: not all of the 17 texts" in made.findings[1]

    def stopped(*args, **kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # nothing was counted: there is nothing to keep
        report(tiny, (stopped() for _ in range(3)), **QUIET)
    with monkeypatch.context() as patch:
        patch.setattr("gemmascope.routing.report.expert_ablation", stopped)
        made = report(tiny, rows(4), **QUIET)
    assert made.silenced is None and made.profile is not None
    assert "what was not measured yet is left out" in capsys.readouterr().out
    assert "not done, or not on all 4 texts: silencing, the first choice alone" in made.findings[1]


def test_ctrl_c_keeps_the_effects_of_the_texts_that_are_done(tiny, capsys, monkeypatch, tmp_path):
    texts, whole = rows(40), report(tiny, rows(40), ["a", "b"] * 20, sample=40, **QUIET)
    stop_after(monkeypatch, 2)
    made = report(tiny, texts, ["a", "b"] * 20, sample=40, **QUIET)
    n = made.silenced.n_texts
    assert n in (24, 32) and f"stopped, with {n} of 40 texts done" in capsys.readouterr().out
    assert made.branch is None and made.estimate is None and made.profile is not None
    assert f"On {n} texts drawn at random" in " ".join(made.findings) and "not on all 40 texts" in made.findings[1]
    numbers = made.silenced.tokens["text"].unique().tolist()
    assert len(numbers) == n and made.silenced.loss.about["settings"]["texts"] == n
    torch.testing.assert_close(made.silenced.loss.values, whole.silenced.loss.values[:, numbers])
    torch.testing.assert_close(made.silenced.kl.values, whole.silenced.kl.values[:, numbers])
    here = torch.tensor(whole.silenced.tokens["text"].isin(numbers).to_numpy())
    torch.testing.assert_close(made.silenced.by_token.values, whole.silenced.by_token.values[:, here])
    tokens = whole.silenced.tokens[here.numpy()].reset_index(drop=True)
    pandas.testing.assert_frame_equal(made.silenced.tokens, tokens)
    assert made.silenced.load.view(2, -1).sum(-1).tolist() == pytest.approx([3, 3])
    assert "Measuring was interrupted" in made.to_html(tmp_path / "page.html").read_text(encoding="utf-8")


def stop_after(monkeypatch, n_batches):
    """Ctrl-C in the midst of a batch of an ablation, when as many are done."""
    run, begun = effects._run_batch, []

    def stopped(*args):
        begun.append(1)
        for number, count in enumerate(run(*args)):
            if len(begun) > n_batches and number == 1:
                raise KeyboardInterrupt
            yield count

    monkeypatch.setattr(effects, "_run_batch", stopped)


def test_one_bar_shows_the_whole_report(nano, languages, monkeypatch):
    bars = []

    class Bar(progress.tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs | dict(delay=0, file=io.StringIO()))
            bars.append(self)
            self.said, self.hidden = [kwargs.get("desc")], kwargs["disable"]

        def set_description(self, desc=None, refresh=True):
            self.said.append(desc)
            super().set_description(desc, refresh)

    monkeypatch.setattr(progress, "tqdm", Bar)
    for module in (counts, trace, activations, sweep):
        monkeypatch.setattr(module, "tqdm", Bar)
    report(nano, *languages, sample=6, max_experts=12)
    shown = [bar for bar in bars if not bar.hidden]
    assert len(shown) == 1 and shown[0].n == shown[0].total > 20
    assert shown[0].said[0] == "counting" and {"contributions", "silencing", "the estimate"} <= set(shown[0].said)


def test_the_sample_is_fair():
    hits = torch.zeros(30)
    for seed in range(600):
        sample = Sample(6, seed)
        assert len(list(sample.passing((torch.full((2,), n), "all") for n in range(30)))) == 30
        hits[[int(ids[0]) for ids, _ in sample.kept]] += 1
    assert len(sample.kept) == 6
    assert (hits - 120).abs().max() < 5 * math.sqrt(600 * 0.2 * 0.8)


def test_a_text_of_one_token_is_counted_and_not_sampled(tiny):
    made = report(tiny, [torch.tensor([5]), *rows(2)], **QUIET)
    assert (made.n_texts, made.n_sampled) == (3, 2)


def test_the_page_stands_alone_and_is_escaped(tiny, tmp_path):
    evil = "</script><img src=x onerror=alert(1)>"
    made = report(tiny, rows(6), [evil, "b"] * 3, **QUIET)
    made.counts.about["model"] = evil
    path = made.to_html(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.count(page.get_plotlyjs()) == 1
    rest = text.replace(page.get_plotlyjs(), "")
    assert "<img" not in rest and rest.count("</script>") == 3
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", rest)
    assert "default-src 'none'" in rest
    for name in made.plots:
        assert f'id="plot-{name}"' in rest
    for html in (made._repr_html_(), made.plots["domains"].to_json().replace("\\u003c", "<")):
        assert "<img" not in html


def test_labels_that_start_alike_keep_their_rows(tiny):
    labels = ["a long name of a file, part 1", "a long name of a file, part 2"] * 3
    [drawn] = report(tiny, rows(6), labels, causal=False, **QUIET).plots["domains"].data
    assert len(set(drawn.y)) == 2 and drawn.z.shape[0] == 2


@pytest.mark.parametrize("n_labels", [0, 1, 2])
def test_plots_are_of_the_tables(tiny, n_labels):
    labels = [f"label {i % n_labels}" for i in range(5)] if n_labels else None
    made = report(tiny, rows(5), labels, **QUIET)
    expected = ["effects", "scatter", "correlations", "layers", *(["domains"] if n_labels == 2 else []), "margins"]
    assert list(made.plots) == expected
    load, loss, control = made.plots["effects"].data
    assert load.z.flatten().tolist() == made.experts["load"].tolist()
    assert loss.z.flatten().tolist() == made.experts["loss"].tolist()
    assert control.z.flatten().tolist() == made.experts["matched load"].tolist()


def test_bad_input_is_refused(tiny):
    with pytest.raises(ValueError, match="tiny 31B is dense .* nano-moe, google/gemma-4-26B-A4B"):
        report(tiny_model("31B"), rows(2))
    with pytest.raises(ValueError, match="the corpus is empty"):
        report(tiny, [])
    with pytest.raises(ValueError, match="more labels than texts"):
        report(tiny, rows(2), ["a", "b", "c"], **QUIET)
    with pytest.raises(ValueError, match="labels for 1 texts, and more texts"):
        report(tiny, rows(2), ["a"], **QUIET)
    with pytest.raises(ValueError, match="sample is 0: give 1 or more"):
        report(tiny, rows(2), sample=0)
    assert report(tiny, rows(5), ["a"] * 5, max_texts=3, causal=False, **QUIET).n_texts == 3


@pytest.mark.parametrize(
    "changes",
    [dict(n_layers=1, layer_kinds=("global",)), dict(experts_per_token=1), dict(n_experts=4), dict(n_ctx=8), {}],
    ids=["one layer", "one expert a token", "no wrong experts left", "windows", "half precision"],
)
def test_every_shape_of_model_has_a_report(changes, tmp_path):
    small = dict(n_layers=2, layer_kinds=("sliding", "global"))
    model = tiny_model("26B-A4B", **(small | changes))
    model = model if changes else model.to(torch.bfloat16)
    texts = rows(4)
    labels = [["even" if place % 2 else "odd" for place in range(len(text))] for text in texts]
    made = report(model, texts, labels, **QUIET)
    made.to_html(tmp_path / "page.html")
    assert made.n_texts == 4 and made.counts.n_tokens == sum(map(len, texts))
    assert (made.branch is None) == (changes == dict(n_experts=4))
    assert (
        made.domains.groupby("label")["n"].first().to_dict() == made.silenced.tokens["label"].value_counts().to_dict()
    )
