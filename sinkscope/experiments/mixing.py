"""How far one changed token spreads, and how similar positions become, with and without a sink.

Barbero et al. 2025, "Why do LLMs attend to the first token?" (arXiv 2504.02732), explain the sink
as a limit on mixing: without it, heads would have to mix the tokens they see, a changed token would
affect all later ones, and representations would become similar. They change one word and follow the
change through the layers, with and without BOS.

1. Take each prompt twice, the second time with another token at one position.
2. Run both in up to three conditions:

   "no bos"
       The text alone. Most models then attend to its first token instead.
   "bos"
       The model's BOS token in front.
   "no sink"
       With BOS where there is one, but in the layers after the residual peak was written no query
       can see the front token. (Hiding it in every layer does not remove the sink: the next token
       is then the first that attends only to itself, and becomes the sink. With rotary positions
       that equals dropping the front token.)
3. Measure the difference of the residual states at every layer and position, and how similar the
   positions are (`metrics.mixing`). Whether a condition has a sink is also measured: `front_rate`
   and `other_rate`.

All other values are of the text's own tokens after the first, so that conditions compare the same
positions and none of them is a sink.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture import batches, paths, runner
from sinkscope.capture.scan import scan
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments import readout
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.interventions import ShiftSinkLogit
from sinkscope.metrics import mixing as definitions
from sinkscope.metrics.residual import residual_norms
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.probe import input_device
from sinkscope.prompts.special_tokens import ordinary_ids, special_tokens
from sinkscope.prompts.tokens import Texts, token_ids, vocabulary_size
from sinkscope.statistics import Interval, estimate

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

CONDITIONS = ("no bos", "bos", "no sink")
_HIDING_SHIFT = -1e4
"""Added to the sink's logit: its attention is then 0 in every dtype."""
_TOKENS = {"cuda": 2**15, "cpu": 2**11}
"""Tokens of one forward pass."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Mixing(Result):
    """Perturbations and similarity of positions, condition by condition.

    `position` counts the text's own tokens from 0, BOS excluded.

    Attributes:
        conditions: Names along `condition`.
        changed: The position whose token is changed.
        hidden_after: The layer after which "no sink" hides the front token; -1 without "no sink".
        front_rate: Share of heads for which the front token is a sink (sink rate, ε = 0.3).
        other_rate: The largest such rate of any other position in the first half.
        perturbation: ‖h_i(x) − h_i(x')‖ after each block, where x' has another token at `changed`
            [activation].
        relative_perturbation: The same over ‖h_i(x)‖ [ratio].
        rank_collapse: μ(V) of the positions after the first [activation], see `metrics.mixing`.
        rank_share: μ(V) over ‖V‖_F of the same positions: 0 if all are equal [ratio].
        matrix_entropy: Matrix entropy of the same positions over its largest possible value
            [share].
    """

    QUESTION = "How far does one changed token spread, with and without a sink?"

    conditions: tuple[str, ...]
    changed: int
    hidden_after: int
    front_rate: Float[Tensor, "condition"]
    other_rate: Float[Tensor, "condition"]
    perturbation: Float[Tensor, "condition prompt layer position"]
    relative_perturbation: Float[Tensor, "condition prompt layer position"]
    rank_collapse: Float[Tensor, "condition prompt layer"]
    rank_share: Float[Tensor, "condition prompt layer"]
    matrix_entropy: Float[Tensor, "condition prompt layer"]

    @property
    def spread(self) -> Float[Tensor, "condition prompt layer"]:
        """Mean relative perturbation of the positions after the changed one [ratio]."""
        return self.relative_perturbation[..., self.changed + 1 :].mean(-1)

    def to_frame(self) -> pd.DataFrame:
        """One row per condition, prompt, layer, position and metric, for `plot.before_after`.

        `position` is -1 for values of a whole prompt.
        """
        pieces = []
        for metric in ("perturbation", "relative_perturbation"):
            pieces.append(self._rows(metric, self[metric], range(self[metric].shape[-1])))
        wholes = {name: self[name] for name in ("rank_collapse", "rank_share", "matrix_entropy")}
        for metric, x in ({"spread": self.spread} | wholes).items():
            pieces.append(self._rows(metric, x[..., None], [-1]))
        return stacked(pieces)

    def _rows(self, metric: str, x: Tensor, positions: Iterable[int]) -> pd.DataFrame:
        _, prompts, layers, _ = x.shape
        axes = {
            "metric": [metric],
            "condition": self.conditions,
            "prompt": range(prompts),
            "layer": range(layers),
            "position": list(positions),
        }
        return tidy(axes, value=x[None])

    def statistics(self) -> dict[str, Any]:
        """Each condition's values after the middle and the last block, and their differences."""
        facts: dict[str, Any] = {}
        for index, condition in enumerate(self.conditions):
            rates = {name: float(self[name][index]) for name in ("front_rate", "other_rate")}
            facts[condition] = rates | self._at(lambda x, index=index: x[index])
        for index, condition in enumerate(self.conditions[1:], start=1):
            # The same prompts run in every condition, so differences are taken prompt by prompt.
            difference = self._at(lambda x, index=index: x[index] - x[0])
            facts[f"{condition} minus {self.conditions[0]}"] = difference
        return facts

    def _at(
        self, choose: Callable[[Tensor], Float[Tensor, "prompt layer"]]
    ) -> dict[str, dict[str, Interval]]:
        """Return three statistics after the middle and the last block."""
        values = {
            "spread": self.spread,
            "rank_share": self.rank_share,
            "matrix_entropy": self.matrix_entropy,
        }
        layers = self.rank_share.shape[2]
        where = {"middle": layers // 2, "last": layers - 1}
        return {
            name: {place: estimate(choose(x)[:, layer]) for place, layer in where.items()}
            for name, x in values.items()
        }

    def summary(self) -> str:
        """Spread of a changed token and similarity of positions, condition by condition."""
        facts = self.statistics()
        lines = [
            f"One token changed (position {self.changed}): spread, the change of later positions "
            "over their norm, and μ(V)/‖V‖, the share of ‖V‖_F that is not their common mean:"
        ]
        for condition in self.conditions:
            own = facts[condition]
            lines.append(
                f"  {condition} (sink rate of the front token {own['front_rate']:.0%}, elsewhere "
                f"{own['other_rate']:.0%}): spread {own['spread']['middle']} half-way up, "
                f"{own['spread']['last']} at the end; μ(V)/‖V‖ {own['rank_share']['middle']}, "
                f"{own['rank_share']['last']}"
            )
        return "\n".join(lines)

    def figures(self) -> dict[str, go.Figure]:
        """Relative perturbation by position, one panel per condition."""
        from sinkscope.plot import before_after

        rows = self.to_frame()
        return {
            "perturbation": before_after(
                rows, "relative_perturbation", about=self.about, positions=[self.changed]
            )
        }


def mixing(
    model: Any,
    texts: Any,
    *,
    conditions: Iterable[str] = CONDITIONS,
    changed: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Mixing:
    """Change one token of each prompt and follow the change, with and without a sink.

    Args:
        model: A bridge with a tokenizer (for BOS), or anything that `load_model` takes.
        texts: Prompts of equal length without BOS (``texts(..., bos="never")``).
        conditions: Of "no bos", "bos" and "no sink".
        changed: The position whose token is replaced by another ordinary one; a quarter of the way
            by default.
        seed: Seed of the replacements.
        progress: Whether to draw a progress bar.

    Returns:
        Perturbations and similarity of positions, condition by condition.

    Raises:
        TextError: If the prompts differ in length, end at the changed position, or begin with BOS.
        UnsupportedError: If no condition is named; if "bos" is requested and the model has none,
            or "no sink" for a model whose logits cannot be shifted.
    """
    model = load_model(model)
    prompts = readout.even(model, texts)
    length = prompts.tokens.shape[1]
    changed = length // 4 if changed is None else changed
    if not 0 < changed < length - 1:
        raise TextError(
            f"The changed position {changed} should have tokens before and after it; prompts run "
            f"from 0 to {length - 1}."
        )
    names = readout.chosen(conditions, CONDITIONS, "conditions")
    front = _front(model, prompts)
    if "bos" in names and front is None:
        raise UnsupportedError('This model has no BOS token, so there is no condition "bos".')
    pairs = torch.stack([prompts.tokens, _with_another(model, prompts.tokens, changed, seed)], 1)
    measured, after = [], -1
    for name in tqdm(names, unit="condition", disable=not progress, leave=False):
        token = None if name == "no bos" else front
        hiding: AbstractContextManager[Any] = nullcontext()
        if name == "no sink":
            after = _peak_layer(model, _preceded(prompts.tokens, token))
            layers = range(after + 1, capabilities(model).n_layers)
            hiding = ShiftSinkLogit(model, _HIDING_SHIFT, position=0, layers=layers)
        with hiding:
            rates = _sink_rates(model, _preceded(prompts.tokens, token))
            measured.append(rates | _follow(model, pairs, token))
    stacked = {field: torch.stack([one[field] for one in measured]) for field in measured[0]}
    return Mixing(
        about=about(model, prompts),
        conditions=names,
        changed=changed,
        hidden_after=after,
        **stacked,
    )


def _preceded(
    tokens: Int[Tensor, "prompt text"], front: int | None
) -> Int[Tensor, "prompt position"]:
    """Return the prompts with a token in front, if there is one."""
    if front is None:
        return tokens
    return torch.cat([torch.full_like(tokens[:, :1], front), tokens], dim=1)


def _peak_layer(model: Any, tokens: Int[Tensor, "prompt position"]) -> int:
    """The first layer after which the front token's residual norm is half of its largest.

    Raises:
        UnsupportedError: If that is the last layer, so that there is none to hide the token in.
    """
    report = scan(model, token_ids(tokens), metrics=["residual"], progress=False)
    norms = report.mean("sink_residual_norm")
    layer = int((norms >= norms.max() / 2).nonzero()[0])
    if layer == len(norms) - 1:
        raise UnsupportedError(
            'The front token\'s norm grows up to the last layer, so that "no sink" has no layer to '
            "hide it in; leave that condition out."
        )
    return layer


def _sink_rates(model: Any, tokens: Int[Tensor, "prompt position"]) -> dict[str, Tensor]:
    """Share of heads whose sink is the front token, and the largest share of another position."""
    rates = scan(model, token_ids(tokens), metrics=["received"], progress=False)["sink_rate"].cpu()
    half = max(2, len(rates) // 2)
    return {"front_rate": rates[0], "other_rate": rates[1:half].max()}


def _front(model: Any, prompts: Texts) -> int | None:
    """The BOS token, or None where there is none.

    Raises:
        TextError: If the prompts begin with it already.
    """
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return None
    try:
        bos = special_tokens(tokenizer, "always", vocabulary_size(model)).prefix[0]
    except TextError:
        return None
    if bos is not None and bool((prompts.tokens[:, 0] == bos).any()):
        raise TextError('These prompts begin with BOS already; pass texts(..., bos="never").')
    return bos


def _with_another(
    model: Any, tokens: Int[Tensor, "prompt position"], changed: int, seed: int
) -> Int[Tensor, "prompt position"]:
    """Return the prompts with another ordinary token at one position."""
    tokenizer = getattr(model, "tokenizer", None)
    known = capabilities(model).d_vocab
    ids = torch.tensor(ordinary_ids(tokenizer, known) if tokenizer is not None else range(known))
    generator = torch.Generator().manual_seed(seed)
    drawn = ids[torch.randint(len(ids), (len(tokens),), generator=generator)]
    # If the same token was drawn, take its neighbour.
    again = ids[(torch.searchsorted(ids, drawn) + 1) % len(ids)]
    tokens = tokens.clone()
    tokens[:, changed] = torch.where(drawn == tokens[:, changed].cpu(), again, drawn)
    return tokens


def _follow(
    model: Any, pairs: Int[Tensor, "prompt version position"], front: int | None
) -> dict[str, Tensor]:
    """All values of one condition [prompt layer ...], on the CPU."""
    caps = capabilities(model)
    device = input_device(model)
    size = max(1, _TOKENS.get(device.type, _TOKENS["cpu"]) // (2 * pairs.shape[2]))
    result: list[dict[int, dict[str, Tensor]]] = []

    def read(layer: int) -> Any:
        return lambda x, hook: result[-1].__setitem__(layer, _measured(x, front is not None))

    hooks = [(caps.hook("resid_post", layer), read(layer)) for layer in range(caps.n_layers)]
    with (
        torch.inference_mode(),
        runner.evaluating(model),
        paths.choose(model, caps, "auto").opened(),
        model.hooks(fwd_hooks=hooks),
    ):
        for some in pairs.split(size):
            rows = _preceded(some.flatten(0, 1), front)
            result.append({})
            mask = torch.ones_like(rows, dtype=torch.bool)
            runner.forward(model, _batch(rows, mask, caps.causal, device))
    return {
        name: torch.cat(
            [torch.stack([one[layer][name] for layer in sorted(one)], dim=1) for one in result]
        )
        for name in result[0][0]
    }


def _batch(
    rows: Int[Tensor, "row position"],
    mask: Bool[Tensor, "row position"],
    causal: bool,
    device: torch.device,
) -> batches.Batch:
    index, none = torch.arange(len(rows)), torch.zeros_like(mask)
    return batches.cut(rows, mask, none, index, causal=causal, device=device)


def _measured(x: Float[Tensor, "row position dim"], front: bool) -> dict[str, Tensor]:
    """The values of one layer, from the residual states of prompts and their changed versions."""
    pairs = x.unflatten(0, (-1, 2))[:, :, int(front) :].float()
    before, after = pairs.unbind(dim=1)
    norms = residual_norms(before)
    moved = residual_norms(before - after)
    rest = torch.ones(before.shape[:2], dtype=torch.bool, device=x.device)
    rest[:, 0] = False
    rank = definitions.rank_collapse(before, rest)
    return {
        "perturbation": moved.cpu(),
        "relative_perturbation": (moved / norms).cpu(),
        "rank_collapse": rank.cpu(),
        "rank_share": (rank / norms[:, 1:].square().sum(dim=1).sqrt()).cpu(),
        "matrix_entropy": definitions.matrix_entropy(before, rest, normalised=True).cpu(),
    }
