"""Make docs/checked.md, what sinkscope was checked against: ``python docs/checked.py``.

1. transformers' own eager model runs over a few prompts, and hooks on its projections and blocks
   keep what goes through them. Nothing of TransformerLens or sinkscope takes part.
2. Every published quantity is computed from that in float64, by the formula that `definitions`
   states, as its paper or the code of its authors has it.
3. The same prompts are scanned, and the largest difference is taken.
4. Attention operators, simulated quantisation and learned sinks are computed by formulas of their
   own as well. What needs a training run or another team's code is compared with numbers recorded
   before; `RECORDED` has them with their sources.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import sinkscope as ss
from sinkscope.attention.operators import OPERATORS
from sinkscope.experiments.readout import losses
from sinkscope.experiments.waiver import position_norms
from sinkscope.metrics.heads import inactivity_scores
from sinkscope.metrics.quantisation import Scheme, quantised
from sinkscope.models.packaged import packaged_folder
from sinkscope.report.settings import library_versions

PAGE = Path(__file__).with_name("checked.md")
ABLATED = ((1, 5), (12, 0), (29, 8))

GU, GUO, SUN = "Gu et al.", "Guo et al.", "Sun et al."
BARBERO, SANDOVAL, YAN = "Barbero et al.", "Sandoval-Segura et al.", "Yan et al."
QWEN, SECONDARY, SINKPROBE = "Gated attention", "Secondary sinks", "SinkProbe"
PEERS = {
    GU: "arXiv 2410.10781; sail-sg/Attention-Sink at af49727, October 2024",
    BARBERO: "arXiv 2504.02732",
    QWEN: "Qiu et al., arXiv 2505.06708; qiuzh20/gated_attention",
    SINKPROBE: "Mudassiruddin7/Attention-Sink, September 2026",
    GUO: "arXiv 2410.13835; GuoTianYu2000/Active-Dormant-Attention at 16b3593, December 2024",
    SANDOVAL: "arXiv 2504.03889; psandovalsegura/inactive-heads",
    SUN: "arXiv 2402.17762; locuslab/massive-activations at 6521c05, February 2024",
    SECONDARY: "arXiv 2512.22213; JeffreyWong20/Secondary-Attention-Sinks at 11eefcc, March 2026",
    "Ramapuram et al.": "arXiv 2409.04431",
    "Xiao et al.": "arXiv 2309.17453, after Miller 2023",
    "Zuhri et al.": "arXiv 2504.20966",
    "gpt-oss": "OpenAI, arXiv 2508.10925, as transformers has it",
    "torch": "torch.fake_quantize_per_tensor_affine",
    YAN: "arXiv 2407.01601, figure 2",
}
"""Where the definitions come from: paper, and repository with the commit that was read."""


@dataclass(frozen=True)
class Row:
    """A quantity that was computed twice.

    Attributes:
        peer: Whose definition it is.
        quantity: What it is called, in words and as a field of a report.
        formula: How it was computed here.
        largest: Largest magnitude of the values compared.
        difference: Largest difference between them.
    """

    peer: str
    quantity: str
    formula: str
    largest: float
    difference: float


# -- transformers alone ----------------------------------------------------------------------------


def states(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What a Llama of transformers computes, layer by layer, in float64.

    Returns:
        ``A`` and ``S`` [layer prompt head query key], ``v`` and ``z`` [layer prompt position head
        channel] with values repeated for the heads of a group, ``W`` [layer dim head channel],
        ``h`` [layer prompt position dim].
    """
    model.set_attn_implementation("eager")
    config, kept = model.config, {}
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    handles = []
    for layer, block in enumerate(model.model.layers):
        attention = block.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            handles.append(
                getattr(attention, name).register_forward_hook(
                    lambda m, a, out, at=(name, layer): kept.__setitem__(at, out.double())
                )
            )
        handles.append(
            attention.o_proj.register_forward_pre_hook(
                lambda m, a, at=("z", layer): kept.__setitem__(at, a[0].double())
            )
        )
        handles.append(
            block.register_forward_hook(
                lambda m, a, out, at=("h", layer): kept.__setitem__(
                    at, (out[0] if isinstance(out, tuple) else out).double()
                )
            )
        )
    with torch.no_grad():
        output = model(ids, output_attentions=True, use_cache=False)
        cos, sin = model.model.rotary_emb(output.logits, torch.arange(ids.shape[1])[None])
    for handle in handles:
        handle.remove()
    layers = range(config.num_hidden_layers)

    def by_head(name: str) -> Tensor:
        x = torch.stack([kept[name, layer] for layer in layers])
        n = heads if name in ("q_proj", "z") else groups
        return x.unflatten(-1, (n, -1)).repeat_interleave(heads // n, dim=3)

    def rotated(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        turned = torch.cat([-x[..., half:], x[..., :half]], -1)
        return x * cos.double()[:, :, None] + turned * sin.double()[:, :, None]

    q, k = rotated(by_head("q_proj")), rotated(by_head("k_proj"))
    scores = torch.einsum("lbqhd,lbkhd->lbhqk", q, k) / math.sqrt(q.shape[-1])
    pattern = torch.stack(output.attentions).double()
    hidden = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    assert (scores.masked_fill(hidden, -torch.inf).softmax(-1) - pattern).abs().max() < 1e-4
    weight = torch.stack([block.self_attn.o_proj.weight.double() for block in model.model.layers])
    return {
        "A": pattern,
        "S": scores,
        "v": by_head("v_proj"),
        "z": by_head("z"),
        "W": weight.detach().unflatten(-1, (heads, -1)),
        "h": torch.stack([kept["h", layer] for layer in layers]),
    }


def definitions(x: dict[str, Tensor]) -> Iterator[tuple[str, str, str, Tensor]]:
    """Peer, quantity, formula and values of each published definition; the sink is position 0."""
    a, s, v, z, h = (x[name] for name in "ASvzh")
    queries = a.shape[-1]
    seen = torch.arange(queries, 0, -1)  # queries that see each key
    alpha = a.sum(-2) / seen  # hidden entries are 0
    uniform = torch.stack([(1 / torch.arange(k + 1, queries + 1)).mean() for k in range(queries)])
    yield (
        GU,
        "received attention (`received_attention`)",
        "α_k = Σ_{i≥k} A_ik / (T − k)",
        (alpha.mean(1)),
    )
    yield (
        GU,
        "sink rate at every key (`sink_rate`)",
        "share of (prompt, layer, head) with α_k > 0.3",
        ((alpha > 0.3).double().mean((0, 1, 2))),
    )
    yield (
        BARBERO,
        "sink rate (`sink_rate_curve`)",
        "the same with ε = 0.8, k = 0",
        ((alpha[..., 0] > 0.8).double().mean()),
    )
    yield QWEN, "F-Attn (`first_token_attention`)", "mean_i A_i0", lead(a[..., 0].mean(-1))
    yield (
        SINKPROBE,
        "ratio to uniform (`uniform_ratio`)",
        "α_k / mean_{i≥k} 1/(i + 1)",
        ((alpha / uniform).mean(1)),
    )
    others = torch.ones(queries, queries, dtype=torch.bool).tril(-1)
    others[:, 0] = False
    mean = s.masked_fill(~others, 0).sum(-1) / others.sum(-1)
    gap = (s[..., 0] - mean)[..., 2:].mean(-1)
    yield GUO, "Δlogit (`sink_logit_gap`)", "mean_{i≥2} (S_i0 − mean_{1≤j<i} S_ij)", lead(gap)
    out = torch.einsum("lbthd,lmhd->lbthm", v, x["W"]).norm(dim=-1)
    yield GUO, "‖Val‖ (`value_norm_out`)", "‖W_O v_0‖", out[:, :, 0].mean(1)
    yield (
        GUO,
        "‖Res‖ (`sink_residual_norm`)",
        "‖h_0‖ after each layer",
        lead(h[:, :, 0].norm(dim=-1)),
    )
    logs = torch.where(a > 0, a.clamp_min(1e-300).log(), 0)
    norms = z.norm(dim=-1)
    scores = {
        "AWFT": a[..., 0].mean(-1),
        "AEQD": -(a * logs).sum(-1).mean(-1),
        "FTVVN": v[:, :, 0].norm(dim=-1),
        "AVVN": v.norm(dim=-1).mean(2),
        "LTHON": norms[:, :, -1],
        "AHON": norms.mean(2),
    }
    by_layer = {f"{name}-LN": score / score.mean(-1, True) for name, score in scores.items()}
    by_layer["LTHON-LN"] = scores["LTHON"] / scores["AHON"].mean(-1, True)
    every = scores | by_layer | {"LTHON-HN": scores["LTHON"] / scores["AHON"]}
    for name, formula in FORMULAS.items():
        yield SANDOVAL, f"{name} (`inactivity_scores`)", formula, lead(every[name])
    size = h.abs()
    middle = size.flatten(2).quantile(0.5, dim=-1)[..., None, None]
    rule = (size > 100) & (size > 1000 * middle)
    yield (
        SUN,
        "massive activations (`massive.count`)",
        "abs(a) > 100 and abs(a) > 1000 median(abs(h))",
        (lead(rule.sum((2, 3)).double())),
    )
    yield (
        SUN,
        "their values (`massive.value`)",
        "a, of all entries that pass",
        h[rule].sort().values,
    )
    yield (
        SECONDARY,
        "cosine to BOS (`cosine_to_sink`)",
        "cos(h_j, h_0)",
        (torch.cosine_similarity(h, h[:, :, :1], dim=-1).mean(1)),
    )


FORMULAS = {
    "AWFT": "mean_i A_i0",
    "AWFT-LN": "AWFT / its mean over the layer's heads",
    "AEQD": "mean_i −Σ_j A_ij ln A_ij",
    "AEQD-LN": "AEQD / its mean over the layer's heads",
    "FTVVN": "‖v_0‖",
    "FTVVN-LN": "FTVVN / its mean over the layer's heads",
    "AVVN": "mean_j ‖v_j‖",
    "AVVN-LN": "AVVN / its mean over the layer's heads",
    "LTHON": "‖z_last‖",
    "LTHON-LN": "LTHON / the mean AHON of the layer's heads",
    "LTHON-HN": "LTHON / AHON",
    "AHON": "mean_i ‖z_i‖",
    "AHON-LN": "AHON / its mean over the layer's heads (HONOR)",
}


def lead(x: Tensor) -> Tensor:
    """From [layer prompt ...] to [prompt layer ...]."""
    return x.transpose(0, 1)


# -- the same by sinkscope -------------------------------------------------------------------------


def of_report(report: ss.SinkReport) -> dict[str, Any]:
    """What a scan found, by the word in the first backticks of a quantity or by a score's name."""
    at = int((report.epsilon - 0.8).abs().argmin())
    assert abs(float(report.epsilon[at]) - 0.8) < 1e-6
    scores = inactivity_scores(
        report.first_token_attention,
        report.attention_entropy,
        report.first_value_norm,
        report.mean_value_norm,
        report.last_output_norm,
        report.head_output_norm,
    )
    plain = (
        *("received_attention", "sink_rate", "first_token_attention", "uniform_ratio"),
        *("sink_logit_gap", "sink_residual_norm", "cosine_to_sink"),
    )
    return {
        **{name: getattr(report, name) for name in plain},
        **scores,
        "sink_rate_curve": report.sink_rate_curve[at, 0],
        "value_norm_out": report.value_norm_out[..., 0],
        "massive.count": report.massive.count.double(),
        "massive.value": report.massive.value.sort().values,
    }


def scanned(model: Any, bridge: Any, ids: Tensor) -> list[Row]:
    """Every definition on a Llama of transformers and on the bridge of the same weights."""
    found = of_report(ss.scan(bridge, ids, progress=False))
    rows = []
    for peer, quantity, formula, wanted in definitions(states(model, ids)):
        name = quantity.split("`")[1]
        ours = found[quantity.split(" ")[0] if name == "inactivity_scores" else name].double()
        rows.append(_row(peer, quantity, formula, ours, wanted))
    return rows


def _row(peer: str, quantity: str, formula: str, ours: Tensor, wanted: Tensor) -> Row:
    assert ours.shape == wanted.shape and torch.equal(ours.isnan(), wanted.isnan()), quantity
    off, size = (ours.double() - wanted.double()).abs().nan_to_num(0), wanted.abs().nan_to_num(0)
    largest = (float(size.max()), float(off.max())) if len(size.flatten()) else (0.0, 0.0)
    return Row(peer, quantity, formula, *largest)


def ablated(model: Any, bridge: Any, ids: Tensor, heads: Any = ABLATED) -> Row:
    """The next-token losses with a head set to zero, one head at a time."""
    ours, wanted = [], []
    texts = ss.token_ids(ids)
    for layer, head in heads:
        width = model.config.hidden_size // model.config.num_attention_heads
        size = slice(head * width, (head + 1) * width)

        def zero(module: Any, args: tuple, size: slice = size) -> tuple:
            z = args[0].clone()
            z[..., size] = 0
            return (z,)

        projection = model.model.layers[layer].self_attn.o_proj
        handle = projection.register_forward_pre_hook(zero)
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[:, :-1].double()
        handle.remove()
        wanted.append(-logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0])
        with ss.AblateHeads(bridge, [(layer, head)]):
            ours.append(losses(bridge, texts)[:, :-1])
    return _row(
        SANDOVAL,
        "loss without a head (`AblateHeads`)",
        f"−ln p(next token) with z_h = 0, for {len(heads)} heads",
        torch.stack(ours),
        torch.stack(wanted),
    )


# -- operators, quantisation, learned sinks --------------------------------------------------------


def operators() -> list[Row]:
    """Each attention operator, entry by entry in float64 loops."""
    torch.manual_seed(0)
    scores = torch.randn(1, 2, 9, 9) * 3
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    sources = {
        "relu": (GUO, "max(s, 0) / n"),
        "sigmoid": ("Ramapuram et al.", "1 / (1 + n e^−s)"),
        "off-by-one": ("Xiao et al.", "e^s / (1 + Σ e^s)"),
        "softpick": ("Zuhri et al.", "max(e^s − 1, 0) / (Σ abs(e^s − 1) + 1e-8)"),
    }
    rows = []
    for name, (peer, formula) in sources.items():
        wanted = torch.zeros(scores.shape, dtype=torch.float64)
        for head in range(2):
            for query in range(9):
                row = [math.exp(float(s)) for s in scores[0, head, query, : query + 1]]
                for key, e in enumerate(row):
                    wanted[0, head, query, key] = {
                        "relu": max(math.log(e), 0) / len(row),
                        "sigmoid": 1 / (1 + len(row) / e),
                        "off-by-one": e / (1 + sum(row)),
                        "softpick": max(e - 1, 0) / (sum(abs(f - 1) for f in row) + 1e-8),
                    }[name]
        ours = OPERATORS[name](scores, visible)
        rows.append(_row(peer, f"attention “{name}” (`ReplaceSoftmax`)", formula, ours, wanted))
    return rows


def quantisers() -> list[Row]:
    """Symmetric integers, against torch's own fake quantisation."""
    torch.manual_seed(0)
    x = torch.randn(1, 16, 24) * 5
    rows = []
    for bits in (8, 4):
        n = 2 ** (bits - 1) - 1
        wanted = torch.fake_quantize_per_tensor_affine(x, float(x.abs().max() / n), 0, -n, n)
        ours = quantised(x, Scheme(format=f"int{bits}"))
        formula = "torch.fake_quantize_per_tensor_affine"
        rows.append(_row("torch", f"int{bits} of a tensor (`Quantise`)", formula, ours, wanted))
    return rows


def learned_sinks() -> Row:
    """The attention that gpt-oss gives to no token, on a small model with random weights."""
    config = transformers.GptOssConfig(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, max_position_embeddings=64, sliding_window=8,
        attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3 if p.ndim > 1 or "sinks" in name else 0.1)
    ids = torch.arange(5, 41).view(2, 18)
    with torch.no_grad():
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    wanted = torch.stack([1 - a.double().sum(-1).mean(-1) for a in attentions], dim=1)
    ours = ss.scan(model, ids, progress=False).learned_sink_mass
    return _row(
        "gpt-oss", "learned sink (`learned_sink_mass`)", "mean_i (1 − Σ_j A_ij)",
        ours, wanted,
    )  # fmt: skip


def position_vectors() -> Row:
    """Norms of MiniLM's learned position vectors."""
    folder = packaged_folder("minilm-l6")
    table = transformers.AutoModel.from_pretrained(folder).embeddings.position_embeddings.weight
    return _row(
        YAN, "norm of the position vectors (`position_norms`)",
        "‖p_t‖, MiniLM-L6", position_norms("minilm-l6").norm, table.detach().double().norm(dim=-1),
    )  # fmt: skip


# -- recorded numbers ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorded:
    """Numbers that others reported, and the same measured with sinkscope.

    Attributes:
        peer: Whose numbers they are.
        quantity: What was measured, and when.
        theirs: As reported.
        ours: As measured.
        source: Where both come from.
    """

    peer: str
    quantity: str
    theirs: tuple[float, ...]
    ours: tuple[float, ...]
    source: str

    @property
    def difference(self) -> float:
        """The largest relative difference."""
        return max(abs(o - t) / abs(t) for o, t in zip(self.ours, self.theirs, strict=True))


_BB = "notebooks of the authors' code; here one H200, bf16, seed 42, tinyshakespeare, k = 3"
_STEPS = "one layer, steps 1,000 and 10,000"
RECORDED = (
    Recorded(GUO, f"Attn to BOS, {_STEPS}", (0.779, 0.811), (0.789, 0.819), _BB),
    Recorded(GUO, f"Δlogit, {_STEPS}", (9.70, 16.8), (9.67, 17.4), _BB),
    Recorded(GUO, f"‖Val‖, {_STEPS}", (3.51, 1.42), (3.56, 1.41), _BB),
    Recorded(GUO, f"‖Res‖, {_STEPS}", (27.0, 72.2), (27.2, 71.8), _BB),
    Recorded(GUO, f"backcopy risk, {_STEPS}", (7.5e-3, 7.9e-5), (5.9e-3, 8.1e-5), _BB),
    Recorded(
        GUO,
        "‖Res‖ after layer 0 of three, steps 1, 2, 4, 6, 8 and 10 thousand",
        (34.4, 43.2, 57.4, 85.1, 116.8, 140.7),
        (33.6, 42.7, 52.7, 79.1, 109.2, 135.1),
        _BB,
    ),
    Recorded(
        SANDOVAL,
        "AWFT at its 30 % quantile, one pass: heads set to zero, and the loss they cost [nat]",
        (389, 0.91),
        (388, 0.95),
        "the authors' code on SmolLM2-135M, 6 × 64 tokens; its text was not recorded, so the two "
        "texts differ ([One pass or two](inactive-heads.md#one-pass-or-two))",
    ),
)  # fmt: skip


# -- the page --------------------------------------------------------------------------------------


def rows(prompts: int = 4, length: int = 64) -> list[Row]:
    """All rows that are computed, on SmolLM2-135M where a language model is needed."""
    folder = packaged_folder("smollm2-135m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    bridge = ss.load_model("smollm2-135m", device="cpu")
    ids = ss.texts("prose", prompts=prompts, length=length).tokenize(bridge).tokens
    return [
        *scanned(model, bridge, ids),
        ablated(model, bridge, ids),
        *operators(),
        *quantisers(),
        learned_sinks(),
        position_vectors(),
    ]


INTRODUCTION = """# What sinkscope was checked against

Made by `python docs/checked.py` on {date} with {versions}.

## Published definitions, computed a second time

Each quantity was computed twice: by sinkscope, and by the formula given here, which the script
implements independently and evaluates in float64 on activations recorded by hooks on transformers'
eager model. The model is SmolLM2-135M in float32 on a CPU, with 4 prompts of 64 tokens of prose,
unless stated otherwise. Positions count from 0; a difference is the largest over all prompts,
layers, heads and positions. The code of the peers was read, at the commit given below, and not run
for this table. Tests compare every field of a report with transformers on [many more
architectures](families.md).
"""
REPORTED = """
## Numbers that others reported

These need a training run or another team's code, and were not computed again for this page.
"""


def line(*cells: str) -> str:
    """A row of a table in Markdown."""
    return f"| {' | '.join(cells)} |\n"


def table(*head: str) -> str:
    """The head of a table in Markdown."""
    return "\n" + line(*head) + "|---" * len(head) + "|\n"


def page(computed: list[Row]) -> str:
    """The page in Markdown."""
    found = library_versions()
    versions = ", ".join(f"{name.replace('_', '-')} {found[name]}" for name in found)
    text = INTRODUCTION.format(date=f"{datetime.date.today():%-d %B %Y}", versions=versions)
    text += table("peer", "quantity", "formula", "largest value", "largest difference")
    for row in computed:
        sizes = f"{row.largest:.4g}", f"{row.difference:.1g}"
        text += line(row.peer, row.quantity, f"`{row.formula}`", *sizes)
    text += REPORTED + table("peer", "quantity", "reported", "here", "largest difference", "source")
    for one in RECORDED:
        numbers = (", ".join(f"{x:g}" for x in values) for values in (one.theirs, one.ours))
        text += line(one.peer, one.quantity, *numbers, f"{one.difference:.0%}", one.source)
    text += "\n## Where the definitions come from\n" + table("peer", "source")
    return text + "".join(line(peer, source) for peer, source in PEERS.items())


if __name__ == "__main__":
    PAGE.write_text(page(rows()), encoding="utf-8")
