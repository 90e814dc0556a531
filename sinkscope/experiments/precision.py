"""What low precision costs, through which tensor and which token, and what to keep.

Sinks and massive activations set the range that a quantiser has to span (Sun et al. 2024, "Massive
Activations in Large Language Models", arXiv 2402.17762; Bondarenko et al. 2023, "Quantizable
Transformers", arXiv 2306.12929). Activations, keys and values are stored by a scheme and read
again (`interventions.Quantise`); the arithmetic, and in steps 1 to 7 the weights, do not change.

1. Run the prompts in full precision, and keep their losses and predictions.
2. Mark tokens to keep in full precision by several rules: sinks and outliers (`token_mask` of a
   scan, or given positions); pivots, in each layer the tokens of the 20 largest |a| of the state
   that enters it (RotateKV, Su et al. 2025, arXiv 2501.16383); the first n tokens.
3. Quantise every tensor by each scheme, with nothing kept, and with the tokens of each rule kept.
   D_sink = Δloss(all quantised) − Δloss(the same, sinks kept) [nat]; the definition is that of the
   attention-sinks-quant repository, the losses are paired prompt by prompt.
4. Quantise one tensor alone, and all but one.
5. Quantise each tensor of each layer alone, with nothing and with the sinks kept. Layers below
   the first one that changes are not run again (`partial_forward`).
6. In the cells of that map with the largest loss although the sinks are kept, keep the channels
   with the largest |x| of the other tokens as well.
7. The keep list, of the cells whose divergence is above a tolerance with the sinks kept: those
   channels, where they at least halve it and bring it below the tolerance; otherwise the whole
   cell. Run the model with it.
8. If asked for: quantise the weights instead, by torchao's configs (`quantised_weights`). They
   belong to no token, so that there is no D_sink of them.

A run whose perplexity exceeds ten times that of full precision is destroyed: its loss is shown,
and no D_sink is computed from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capture import paths, runner
from sinkscope.capture.batches import Batch
from sinkscope.capture.scan import scan
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.partial_forward import Partway, Track, with_loss, with_predictions
from sinkscope.experiments.quantised_weights import WEIGHTS, quantised_weights
from sinkscope.experiments.result import Result, about, stacked, tidy
from sinkscope.experiments.resume import Kept, kept_in, request_of
from sinkscope.interventions.base import check_positions
from sinkscope.interventions.calibration import needs_calibration, run_through
from sinkscope.interventions.quantise import Ends, Quantise, channel_ends, check_tensors
from sinkscope.metrics.quantisation import Scheme
from sinkscope.metrics.residual import pivot_tokens
from sinkscope.models.active import refuse_short_prompts
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.probe import input_device
from sinkscope.models.provenance import digest, model_source
from sinkscope.output import and_more, as_json, counted, listed, number, table_as_text, write_file
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.tokens import Texts, check_reached
from sinkscope.statistics import Interval, estimate
from sinkscope.validation import one_of, real_number, strings, whole_number, whole_numbers

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

SCHEMES = ("int8-tensor", "int8-token", "fp8-tensor", "int4-group64-asym")
FIRST = (1, 4)
NOTHING, SINKS, PIVOTS = "nothing", "sinks", "pivots"
STATES = (NOTHING, SINKS)
"""Names of what is kept in the two maps of layers and tensors."""
TOO_MUCH = 10.0
"""A run is destroyed if its perplexity exceeds this many times that of full precision."""
CHANNELS = 8
"""Number of channels kept in a cell of the map."""
CELLS = 8
"""Number of cells of the map in which this is tried."""
TOLERANCE = 0.01
"""Divergence of a cell above which it is in the keep list [nat]."""
_ENTRIES = 20
_LOGITS = {"cuda": 2**28, "cpu": 2**26}
"""Most log-probabilities kept for comparison at once."""
_NAMED = 6

Marks = Bool[Tensor, "layer prompt position"]
Losses = tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]
"""Mean loss, and mean divergence from the predictions of full precision, of some prompts."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Precision(Result):
    """Loss and divergence of a quantised model: by scheme, tokens kept, tensor and layer.

    Losses are means over a prompt's predictions of the next token [nat]; divergences are
    KL(full precision ‖ quantised) of the same predictions [nat].

    Attributes:
        model: The model's name.
        schemes: Names along `scheme`.
        kept: Rules along `rule`: "nothing", "sinks", "pivots", "first n".
        tensors: What is quantised, names along `tensor`.
        mapped: The scheme of the map of layers and tensors; "" if there is none.
        tolerance: Divergence of a cell of the map above which it is in the keep list [nat].
        tokens: Token ids; 0 where padded.
        length: Tokens of each prompt.
        sinks: The tokens that the rule "sinks" keeps.
        tokens_kept: Number of tokens of a prompt that each rule keeps, mean over layers.
        loss: Loss in full precision.
        quantised_loss: With every tensor quantised, and the tokens of a rule kept.
        divergence: The same.
        alone_loss: With one tensor quantised, nothing kept.
        alone_divergence: The same.
        without_loss: With all tensors but one quantised, nothing kept.
        without_divergence: The same.
        map_loss: With one tensor of one layer quantised, in the first prompts; state 0 keeps
            nothing, state 1 the sinks.
        map_divergence: The same.
        cell_layer: Layers of the cells in which channels are kept, worst first; -1 for none.
        cell_tensor: Their tensors, as indices of `tensors`.
        cell_channel: The channels that are kept there, -1 where a tensor has fewer.
        cell_divergence: `map_divergence` with the sinks and these channels kept.
        listed_loss: With every tensor quantised by the mapped scheme, all that is on the keep list
            kept.
        listed_divergence: The same.
        token_text: The text of each token, where the model has a tokenizer.
        weights: How the weights were quantised, names along `weight_scheme`; None if they were not.
        weight_loss: With the weights quantised, and nothing else.
        weight_divergence: The same.
    """

    QUESTION = "What does low precision cost, and what must stay in full precision?"

    model: str
    schemes: list[str]
    kept: list[str]
    tensors: list[str]
    mapped: str
    tolerance: float
    tokens: Int[Tensor, "prompt position"]
    length: Int[Tensor, "prompt"]
    sinks: Bool[Tensor, "prompt position"]
    tokens_kept: Float[Tensor, "rule prompt"]
    loss: Float[Tensor, "prompt"]
    quantised_loss: Float[Tensor, "scheme rule prompt"]
    divergence: Float[Tensor, "scheme rule prompt"]
    alone_loss: Float[Tensor, "scheme tensor prompt"]
    alone_divergence: Float[Tensor, "scheme tensor prompt"]
    without_loss: Float[Tensor, "scheme tensor prompt"]
    without_divergence: Float[Tensor, "scheme tensor prompt"]
    map_loss: Float[Tensor, "state layer tensor mapped_prompt"] | None = None
    map_divergence: Float[Tensor, "state layer tensor mapped_prompt"] | None = None
    cell_layer: Int[Tensor, "cell"] | None = None
    cell_tensor: Int[Tensor, "cell"] | None = None
    cell_channel: Int[Tensor, "cell channel"] | None = None
    cell_divergence: Float[Tensor, "cell mapped_prompt"] | None = None
    listed_loss: Float[Tensor, "prompt"] | None = None
    listed_divergence: Float[Tensor, "prompt"] | None = None
    token_text: list[list[str]] | None = None
    weights: list[str] | None = None
    weight_loss: Float[Tensor, "weight_scheme prompt"] | None = None
    weight_divergence: Float[Tensor, "weight_scheme prompt"] | None = None

    def is_destroyed(self, loss: Float[Tensor, "prompt"]) -> bool:
        """Whether the perplexity is above ten times that of full precision, or not finite.

        Args:
            loss: Losses of a run of all prompts, or of the first ones.
        """
        change = float((loss - self.loss[: len(loss)]).double().mean())
        return not change <= math.log(TOO_MUCH)

    def cost(self, scheme: str, kept: str = NOTHING) -> Interval:
        """Δloss: that of the quantised model minus that of full precision [nat].

        Args:
            scheme: One of `schemes`.
            kept: One of `kept`.
        """
        return estimate(self._loss(scheme, kept) - self.loss)

    def recovered(self, scheme: str, kept: str = SINKS) -> Interval | None:
        """D: by how much keeping the tokens of a rule lowers the loss [nat]; D_sink for "sinks".

        None where either run is destroyed.

        Args:
            scheme: One of `schemes`.
            kept: One of `kept`.
        """
        runs = self._loss(scheme, NOTHING), self._loss(scheme, kept)
        return None if any(map(self.is_destroyed, runs)) else estimate(runs[0] - runs[1])

    def _loss(self, scheme: str, kept: str) -> Float[Tensor, "prompt"]:
        return self.quantised_loss[self.schemes.index(scheme), self.kept.index(kept)]

    def cells(self) -> list[dict[str, Any]]:
        """The cells of the map: layer, tensor, divergences and channels, worst first.

        The order is that of the divergence with the sinks kept. `with_channels` is the divergence
        with the `channels` kept too, where that was tried.
        """
        if self.map_divergence is None or self.cell_layer is None:
            return []
        mean = self.map_divergence.double().mean(-1)
        tried: dict[tuple[int, int], int] = {
            (layer, tensor): cell
            for cell, (layer, tensor) in enumerate(
                zip(self.cell_layer.tolist(), self["cell_tensor"].tolist(), strict=True)
            )
        }
        result = []
        for layer in range(mean.shape[1]):
            for tensor, name in enumerate(self.tensors):
                cell = tried.get((layer, tensor))
                record = {
                    "layer": layer,
                    "tensor": name,
                    "divergence": float(mean[0, layer, tensor]),
                    "with_sinks": float(mean[1, layer, tensor]),
                    "with_channels": None,
                    "channels": [],
                }
                if cell is not None:
                    channels = self["cell_channel"][cell]
                    record["channels"] = channels[channels >= 0].tolist()
                    record["with_channels"] = float(self["cell_divergence"][cell].double().mean())
                result.append(record)
        return sorted(result, key=lambda one: -one["with_sinks"])

    def keep_list(self) -> dict[str, Any]:
        """What to keep in full precision for the mapped scheme, for a quantiser to read.

        Returns:
            model, scheme, tensors and tolerance [nat]; tokens: `positions`, those marked in every
            prompt; `ids`, for each token id that is marked anywhere, its text, how often it is
            marked, and how often it occurs; `prompts`, the marked positions of each. channels:
            (layer, tensor, channels). layers: (layer, tensor) that stay whole. With perplexity in
            full precision, quantised, and with the list.
        """
        whole, channels = _listed(self.cells(), self.tolerance)
        mean = {name: self._perplexity(x) for name, x in self._states().items()}
        return {
            "model": self.model,
            "scheme": self.mapped,
            "tensors": self.tensors,
            "tolerance": self.tolerance,
            "tokens": self._tokens(),
            "channels": [
                {"layer": layer, "tensor": tensor, "channels": list(which)}
                for (layer, tensor), which in channels.items()
            ],
            "layers": [{"layer": layer, "tensor": tensor} for layer, tensor in whole],
            "perplexity": mean,
        }

    def _states(self) -> dict[str, Float[Tensor, "prompt"]]:
        states = {"full": self.loss}
        if self.mapped and self.listed_loss is not None:
            states |= {name: self._loss(self.mapped, kept) for name, kept in _WORDS.items()}
            states["list"] = self.listed_loss
        return states

    def _tokens(self) -> dict[str, Any]:
        rows = [row.nonzero().flatten().tolist() for row in self.sinks]
        everywhere = set(rows[0]).intersection(*rows[1:])
        seen: dict[int, dict[str, Any]] = {}
        for prompt, row in enumerate(rows):
            for position in row:
                token = int(self.tokens[prompt, position])
                text = None if self.token_text is None else self.token_text[prompt][position]
                new = {"id": token, "text": text, "marked": 0}
                seen.setdefault(token, new)["marked"] += 1
        real = torch.arange(self.tokens.shape[1]) < self.length[:, None]
        for token, one in seen.items():
            one["occurs"] = int(((self.tokens == token) & real).sum())
        ids = sorted(seen.values(), key=lambda one: -one["marked"])
        return {"positions": sorted(everywhere), "ids": ids, "prompts": rows}

    @staticmethod
    def _perplexity(loss: Float[Tensor, "prompt"]) -> float:
        return float(loss.double().mean().exp())

    def statistics(self) -> dict[str, Any]:
        """Costs by scheme and rule, by tensor, of weights, the worst cells, and the keep list."""
        facts: dict[str, Any] = {
            "loss": estimate(self.loss),
            "perplexity": self._perplexity(self.loss),
            "tokens_kept": {
                rule: float(self.tokens_kept[at].mean()) for at, rule in enumerate(self.kept)
            },
            "schemes": {name: self._of_scheme(name) for name in self.schemes},
            "weights": {
                name: self._of_run(self["weight_loss"][at], self["weight_divergence"][at])
                for at, name in enumerate(self.weights or ())
            },
        }
        if self.map_divergence is not None:
            facts["mapped"] = self.mapped
            facts["cells"] = self.cells()
            facts["keep"] = self.keep_list()
        if self.listed_loss is not None and self.listed_divergence is not None:
            facts["with_keep_list"] = self._of_run(self.listed_loss, self.listed_divergence)
        return facts

    def _of_run(self, loss: Tensor, divergence: Tensor) -> dict[str, Any]:
        return {
            "loss_change": estimate(loss - self.loss),
            "perplexity": self._perplexity(loss),
            "divergence": estimate(divergence),
            "destroyed": self.is_destroyed(loss),
        }

    def _of_scheme(self, name: str) -> dict[str, Any]:
        at = self.schemes.index(name)
        rules = {
            rule: self._of_run(self.quantised_loss[at, row], self.divergence[at, row])
            | ({} if rule == NOTHING else {"recovered": self.recovered(name, rule)})
            for row, rule in enumerate(self.kept)
        }
        parts = {}
        for word, loss, divergence in (
            ("alone", self.alone_loss, self.alone_divergence),
            ("without", self.without_loss, self.without_divergence),
        ):
            parts[word] = {
                tensor: self._of_run(loss[at, row], divergence[at, row])
                for row, tensor in enumerate(self.tensors)
                if not loss[at, row].isnan().any()
            }
        return {"kept": rules, **parts}

    def summary(self) -> str:
        """Tables by scheme and rule and by tensor, the worst cells, and the keep list in words."""
        facts = self.statistics()
        each = [f"{rule} {n:.1f}" for rule, n in facts["tokens_kept"].items() if rule != NOTHING]
        head = (
            f"In full precision the loss is {facts['loss']} nat, the perplexity "
            f"{number(facts['perplexity'])}. Quantised: {', '.join(self.tensors)}. Δloss is the "
            "change of the loss, KL the divergence from the predictions of full precision, D what "
            "keeping these tokens in full precision gains (D_sink for the sinks), all in nat; a "
            f"run above {TOO_MUCH:g} times that perplexity is destroyed, and has no D. 95 % "
            f"intervals over prompts. Tokens kept of a prompt: {', '.join(each)}."
        )
        parts = "Δloss with one tensor quantised alone, and with all but that one [nat]:"
        tables = [head, self._by_rule(facts), parts, self._by_tensor(facts)]
        return "\n".join([*tables, *self._map_in_words(facts), self._weights_in_words(facts)])

    @staticmethod
    def _weights_in_words(facts: dict[str, Any]) -> str:
        if not facts["weights"]:
            return "Weights are not quantised."
        each = [
            f"{name} perplexity {number(run['perplexity'])}, Δloss {run['loss_change'].signed()}, "
            f"KL {run['divergence']}" + (", destroyed" if run["destroyed"] else "")
            for name, run in facts["weights"].items()
        ]
        return f"Weights of the blocks alone, by torchao: {'; '.join(each)}."

    def _by_rule(self, facts: dict[str, Any]) -> str:
        rows = []
        for name, one in facts["schemes"].items():
            for rule, run in one["kept"].items():
                gain = run.get("recovered")
                rows.append(
                    [
                        name if rule == NOTHING else "",
                        rule,
                        number(run["perplexity"]),
                        run["loss_change"].signed(),
                        number(run["divergence"].mean),
                        "destroyed" if run["destroyed"] else gain.signed() if gain else "",
                    ]
                )
        return table_as_text(["scheme", "kept", "perplexity", "Δloss", "KL", "D"], rows)

    def _by_tensor(self, facts: dict[str, Any]) -> str:
        def cell(parts: dict[str, Any], tensor: str) -> str:
            run = parts.get(tensor)
            if run is None:
                return ""
            return "destroyed" if run["destroyed"] else f"{run['loss_change'].mean:+.3f}"

        rows = [
            [name if word == "alone" else "", word, *(cell(one[word], t) for t in self.tensors)]
            for name, one in facts["schemes"].items()
            for word in ("alone", "without")
        ]
        return table_as_text(["scheme", "", *self.tensors], rows)

    def _map_in_words(self, facts: dict[str, Any]) -> list[str]:
        if self.map_divergence is None or "keep" not in facts:
            return []
        cells, keep = facts["cells"], facts["keep"]
        worst = sorted(cells, key=lambda one: -one["divergence"])[:_NAMED]
        named = [f"{_name(one)} ({number(one['divergence'])})" for one in worst]
        left = [f"{_name(one)} ({number(one['with_sinks'])})" for one in cells[:_NAMED]]
        lines = [
            f"One tensor of one layer at a time, {self.mapped}, "
            f"{counted(self.map_divergence.shape[-1], 'prompt')}: largest KL in {listed(named)}; "
            f"with the sinks kept, in {listed(left)}."
        ]
        channels = [
            f"{one['layer']} {one['tensor']} ({', '.join(map(str, one['channels']))})"
            for one in keep["channels"]
        ]
        layers = [f"{one['layer']} {one['tensor']}" for one in keep["layers"]]
        positions = ", ".join(map(str, keep["tokens"]["positions"])) or "none in every prompt"
        lines.append(
            f"Keep list: {counted(int(self.sinks.sum()), 'token')} of {len(self.sinks)} prompts "
            f"(positions in every prompt: {positions}); channels: "
            f"{and_more(channels[:_NAMED], len(channels)) or 'none'}; whole: "
            f"{and_more(layers[:_NAMED], len(layers)) or 'none'}."
        )
        if "with_keep_list" in facts:
            run, ppl = facts["with_keep_list"], keep["perplexity"]
            lines.append(
                f"Perplexity in full precision {number(ppl['full'])}, {self.mapped} "
                f"{number(ppl['quantised'])}, with the sinks kept {number(ppl['with_sinks'])}, "
                f"with the keep list {number(run['perplexity'])} (Δloss "
                f"{run['loss_change'].signed()}, KL {run['divergence']})."
            )
        return lines

    def to_frame(self) -> pd.DataFrame:
        """One row per run and prompt.

        Returns:
            what: "all", "alone", "without", "cell", "keep list" or "weights"; scheme, kept, tensor
            ("" for all), layer (-1 for all), prompt; loss, loss_change and divergence [nat];
            destroyed.
        """
        prompts = range(len(self.loss))
        first = tidy(
            {"scheme": self.schemes, "kept": self.kept, "prompt": prompts},
            what="all", tensor="", layer=-1, loss=self.quantised_loss, divergence=self.divergence,
        )  # fmt: skip
        pieces = [first]
        for what, loss, divergence in (
            ("alone", self.alone_loss, self.alone_divergence),
            ("without", self.without_loss, self.without_divergence),
        ):
            axes = {"scheme": self.schemes, "tensor": self.tensors, "prompt": prompts}
            more = dict(what=what, kept=NOTHING, layer=-1, loss=loss, divergence=divergence)
            pieces.append(tidy(axes, **more))
        if self.map_loss is not None:
            axes = {
                "kept": STATES,
                "layer": range(self.map_loss.shape[1]),
                "tensor": self.tensors,
                "prompt": range(self.map_loss.shape[3]),
            }
            more = dict(what="cell", scheme=self.mapped)
            losses = dict(loss=self.map_loss, divergence=self["map_divergence"])
            pieces.append(tidy(axes, **more, **losses))
        if self.listed_loss is not None:
            more = dict(what="keep list", scheme=self.mapped, kept="list", tensor="", layer=-1)
            losses = dict(loss=self.listed_loss, divergence=self["listed_divergence"])
            pieces.append(tidy({"prompt": prompts}, **more, **losses))
        if self.weights:
            axes = {"scheme": self.weights, "prompt": prompts}
            more = dict(what="weights", kept=NOTHING, tensor="", layer=-1)
            losses = dict(loss=self["weight_loss"], divergence=self["weight_divergence"])
            pieces.append(tidy(axes, **more, **losses))
        frame = stacked(pieces).dropna(subset="loss", ignore_index=True)
        frame["loss_change"] = frame["loss"] - self.loss.double().numpy()[frame["prompt"]]
        runs = frame.groupby(["what", "scheme", "kept", "tensor", "layer"])["loss_change"]
        mean: pd.Series = runs.transform("mean")  # pyright: ignore[reportAssignmentType]
        frame["destroyed"] = ~mean.le(math.log(TOO_MUCH))
        first_columns = ["what", "scheme", "kept", "tensor", "layer", "prompt"]
        order = [*first_columns, "loss", "loss_change", "divergence", "destroyed"]
        return frame.reindex(columns=order)

    def figures(self) -> dict[str, go.Figure]:
        """D by scheme and rule; the map of layers and tensors, with nothing and the sinks kept."""
        from sinkscope.plot import damage_map, kept_tokens

        frame = self.to_frame()
        drawn = {"kept-tokens": kept_tokens(frame, about=self.about)}
        if self.map_loss is not None:
            subtitle = f"{self.about} · {self.mapped}"
            drawn["damage"] = damage_map(frame, about=subtitle)
        return drawn

    def save(self, path: str | Path, name: str | None = None) -> list[Path]:
        """Write the result as the others, and the keep list as ``.keep.json`` beside it.

        Args:
            path: Of the files, without suffix.
            name: Deprecated, see `Result.save`.
        """
        written = super().save(path, name)
        if self.map_divergence is None:
            return written
        keep = as_json(self.keep_list(), indent=1) + "\n"
        return [*written, write_file(f"{written[0].with_suffix('')}.keep.json", keep)]


_WORDS = {"quantised": NOTHING, "with_sinks": SINKS}


def _name(cell: dict[str, Any]) -> str:
    return f"{cell['layer']} {cell['tensor']}"


def _listed(
    cells: Iterable[dict[str, Any]], tolerance: float
) -> tuple[list[tuple[int, str]], dict[tuple[int, str], tuple[int, ...]]]:
    """The cells that stay whole, and the channels that are kept in others."""
    whole, channels = [], {}
    for one in cells:
        before, after = one["with_sinks"], one["with_channels"]
        if before <= tolerance:
            continue
        where = one["layer"], one["tensor"]
        if after is not None and after <= min(before / 2, tolerance):
            channels[where] = tuple(one["channels"])
        else:
            whole.append(where)
    return whole, channels


def precision(
    model: Any,
    texts: Any,
    *,
    schemes: str | Iterable[str] = SCHEMES,
    tensors: str | Iterable[str] | None = None,
    sinks: int | Iterable[int] | None = None,
    first: Iterable[int] = FIRST,
    calibration: Any = None,
    mapped: str | None = "",
    map_prompts: int = 2,
    tolerance: float = TOLERANCE,
    weights: str | Iterable[str] = (),
    file: str | Path | None = None,
    progress: bool = True,
) -> Precision:
    """Measure the cost of quantised activations, keys and values, by token and tensor.

    Each scheme takes 3 + 2 · tensors passes and one for each number of first tokens; the map takes
    two parts of a pass for each layer and tensor, on `map_prompts` prompts.

    Args:
        model: A bridge, or anything that `load_model` takes; causal, with a trained output head.
        texts: Prompts; they may differ in length, since each length runs by itself.
        schemes: Names such as "int8-tensor", see `metrics.quantisation.Scheme`.
        tensors: Some of `interventions.quantise.TENSORS`; by default all that the model exposes,
            ("key", "value") for a KV cache alone.
        sinks: Positions to keep as sinks; by default the tokens that `token_mask` of a scan of
            these prompts marks.
        first: The numbers of first tokens to keep for comparison.
        calibration: Other texts, on which the ranges of static schemes are measured.
        mapped: The scheme of the map of layers and tensors; the first one by default, None for no
            map and no keep list.
        map_prompts: The first prompts, on which the map is measured.
        tolerance: Divergence of a cell of the map above which it is in the keep list [nat].
        weights: How to quantise the weights of the blocks in runs of their own, of
            `quantised_weights.WEIGHTS`; by torchao, and by default not at all.
        file: A ``.nc`` file in which the result is saved while it is measured, to continue from it.
        progress: Whether to draw a progress bar.

    Returns:
        Losses and divergences, prompt by prompt.

    Raises:
        UnsupportedError: If the model has no loss, there is no such scheme or tensor, a static
            scheme has no calibration, or weights are to be quantised and torchao is not installed
            or does not quantise all weights of the blocks.
        TextError: If a prompt has a single token, or lacks a position given as a sink.
        ReportError: If the file holds another request's result, another process is writing to it,
            or hooks or interventions are in force, which a file cannot record.
    """
    model = load_model(model)
    file = kept_in(file, model)
    caps = with_loss(capabilities(model))
    prompts = with_predictions(as_texts(texts).tokenize(model).right_padded())
    refuse_short_prompts(model, prompts.mask)
    names = strings("schemes", schemes, UnsupportedError)
    chosen = tuple(dict.fromkeys(str(Scheme.parse(name)) for name in names))
    if not chosen:
        raise UnsupportedError(f"No scheme is named; name some such as {', '.join(SCHEMES)}.")
    on_map = None if mapped is None else chosen[0] if mapped == "" else str(Scheme.parse(mapped))
    if on_map is not None and on_map not in chosen:
        raise UnsupportedError(
            f"The map is asked for of {on_map}, which is none of the schemes {', '.join(chosen)}."
        )
    given = None if sinks is None else _positions(sinks, prompts)
    counts = whole_numbers("first", first, at_least=1, error=TextError) if _some(first) else ()
    map_prompts = whole_number("map_prompts", map_prompts, at_least=1, error=TextError)
    tolerance = real_number("tolerance", tolerance, at_least=0, error=UnsupportedError)
    stored = strings("weights", weights, UnsupportedError)
    for name in stored:
        one_of("weights", name, WEIGHTS, error=UnsupportedError)
    static = [name for name in chosen if Scheme.parse(name).static]
    stand_in = None
    if static:
        stand_in = as_texts(needs_calibration(static[0], calibration)).tokenize(model)
        stand_in = stand_in.right_padded()
    how = paths.choose(model, caps, "auto")
    with how.opened():  # which tensors a model exposes depends on it
        parts = check_tensors(tensors, capabilities(model))
    request = {}
    if file is not None:
        request = request_of(
            model,
            prompts,
            schemes=list(chosen),
            tensors=list(parts),
            sinks="auto" if given is None else list(given),
            first=list(counts),
            calibration=None if stand_in is None else digest(stand_in),
            mapped=on_map,
            map_prompts=map_prompts,
            tolerance=tolerance,
            **({"weights": list(stored)} if stored else {}),
        )
    rules = [NOTHING, SINKS, PIVOTS, *(f"first {n}" for n in counts)]
    with Kept(Precision, file, request) as kept:
        result = kept.found
        if result is not None and _complete(result):
            return result
        marks = _marks(model, prompts, given, counts)
        if result is None:
            result = _empty(
                model, prompts, chosen, rules, parts, marks, on_map, map_prompts, tolerance, stored
            )
        ends: dict[str, dict[tuple[int, str], Ends]] = {}
        if stand_in is not None:
            apart = _marks(model, stand_in, given, counts)
            with how.opened():
                for rule in rules:
                    ends[rule] = channel_ends(model, stand_in, parts, marked=apart[rule])
        run = _Run(model, prompts, how, marks, ends)
        fill(result, run, lambda: kept.grew(result), progress)
    return result


def _some(first: Any) -> bool:
    return not isinstance(first, tuple | list) or len(first) > 0


def _positions(sinks: Any, prompts: Texts) -> tuple[int, ...]:
    positions = tuple(sorted(check_positions(sinks)))
    check_reached(positions, prompts)
    return positions


def _complete(result: Precision) -> bool:
    wanted = [result.quantised_loss, result.alone_loss]
    if len(result.tensors) > 1:
        wanted.append(result.without_loss)
    wanted += [
        x
        for x in (
            result.map_loss, result.cell_divergence, result.listed_loss, result.weight_loss,
        )
        if x is not None
    ]  # fmt: skip
    return not any(bool(x.isnan().any()) for x in wanted)


def _empty(
    model: Any,
    prompts: Texts,
    schemes: tuple[str, ...],
    rules: list[str],
    tensors: tuple[str, ...],
    marks: Mapping[str, Marks],
    mapped: str | None,
    map_prompts: int,
    tolerance: float,
    weights: tuple[str, ...],
) -> Precision:
    """Return an empty result."""
    size = len(prompts)
    layers = capabilities(model).n_layers

    def nothing(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan)

    by_rule = len(schemes), len(rules), size
    by_tensor = len(schemes), len(tensors), size
    more: dict[str, Any] = {}
    if weights:
        more = {"weights": list(weights)}
        more |= {name: nothing(len(weights), size) for name in ("weight_loss", "weight_divergence")}
    if mapped is not None:
        few = min(map_prompts, size)
        cells = min(CELLS, layers * len(tensors))
        more |= {
            "map_loss": nothing(len(STATES), layers, len(tensors), few),
            "map_divergence": nothing(len(STATES), layers, len(tensors), few),
            "cell_layer": torch.full((cells,), -1),
            "cell_tensor": torch.full((cells,), -1),
            "cell_channel": torch.full((cells, CHANNELS), -1),
            "cell_divergence": nothing(cells, few),
            "listed_loss": nothing(size),
            "listed_divergence": nothing(size),
        }
    return Precision(
        about=about(model, prompts),
        model=model_source(model).name,
        schemes=list(schemes),
        kept=rules,
        tensors=list(tensors),
        mapped=mapped or "",
        tolerance=tolerance,
        token_text=prompts.strings,
        tokens=prompts.tokens,
        length=prompts.lengths,
        sinks=marks[SINKS][0],
        tokens_kept=torch.stack([marks[rule].sum(2).float().mean(0) for rule in rules]),
        loss=nothing(size),
        quantised_loss=nothing(*by_rule),
        divergence=nothing(*by_rule),
        alone_loss=nothing(*by_tensor),
        alone_divergence=nothing(*by_tensor),
        without_loss=nothing(*by_tensor),
        without_divergence=nothing(*by_tensor),
        **more,
    )


def _marks(
    model: Any, prompts: Texts, sinks: tuple[int, ...] | None, first: Iterable[int]
) -> dict[str, Marks]:
    """Return the tokens that each rule keeps, in every layer."""
    caps = capabilities(model)
    position = torch.arange(prompts.mask.shape[1])
    if sinks is None:
        wanted = [name for name in ("received", "residual") if name in caps.available]
        marked = scan(model, prompts, metrics=wanted, progress=False).token_mask().cpu()
    else:
        marked = torch.isin(position, torch.tensor(sinks)) & prompts.mask
    kinds = {NOTHING: torch.zeros_like(prompts.mask), SINKS: marked}
    kinds |= {f"first {n}": (position < n) & prompts.mask for n in first}
    marks = {rule: kind.expand(caps.n_layers, -1, -1).clone() for rule, kind in kinds.items()}
    return marks | {PIVOTS: pivots(model, prompts)}


def pivots(model: Any, prompts: Texts) -> Marks:
    """Return the pivot tokens of each layer and prompt, see `metrics.residual.pivot_tokens`.

    Args:
        model: A bridge.
        prompts: Right-padded.
    """
    caps = capabilities(model)
    marks = torch.zeros(caps.n_layers, *prompts.mask.shape, dtype=torch.bool)

    def listener(layer: int) -> Callable[[Tensor, Batch], None]:
        def listen(x: Tensor, batch: Batch) -> None:
            marks[layer, batch.rows, : batch.length] = pivot_tokens(x, batch.mask, _ENTRIES).cpu()

        return listen

    hooks = {caps.hook("resid_pre", layer): listener(layer) for layer in range(caps.n_layers)}
    run_through(model, prompts, hooks)
    return marks


# -- running it ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """What is quantised, and what is kept.

    Attributes:
        scheme: How.
        where: Layers by tensor.
        rule: The rule for the tokens that are kept.
        channels: Those kept, by layer and tensor.
        weights: How the weights are quantised; "" for not at all.
    """

    scheme: Scheme
    where: Mapping[str, tuple[int, ...]]
    rule: str = NOTHING
    channels: Mapping[tuple[int, str], tuple[int, ...]] = field(default_factory=dict)
    weights: str = ""

    @property
    def start(self) -> int:
        """The first layer that is quantised."""
        return min((layer for layers in self.where.values() for layer in layers), default=0)


@dataclass(frozen=True)
class _Job:
    """A case, and the rows of the result that it fills (prompt by prompt)."""

    case: _Case
    loss: Float[Tensor, "prompt"] | None
    divergence: Float[Tensor, "prompt"]

    def missing(self, rows: list[int]) -> list[int]:
        """Return those of some prompts that are still to be measured."""
        return [r for r in rows if r < len(self.divergence) and bool(self.divergence[r].isnan())]


def fill(result: Precision, run: _Run, grew: Callable[[], None], progress: bool) -> None:
    """Measure all values that are still nan.

    Args:
        result: What to fill.
        run: Runs the model.
        grew: Called after each measurement.
        progress: Whether to draw a progress bar.
    """
    jobs = [*_by_scheme(result, run.layers), *_of_weights(result), *_of_map(result, run.layers)]
    total = sum(len(job.divergence) for job in jobs)
    if result.cell_divergence is not None:
        total += result.cell_divergence.numel() + len(result.loss)
    with tqdm(total=total, unit="prompt", disable=not progress, leave=False) as bar:

        def go(jobs: list[_Job]) -> None:
            for rows in run.groups():
                if not any(job.missing(rows) for job in jobs):
                    continue
                result.loss[rows] = run.begin(rows)
                for job in jobs:
                    how = f"{job.case.scheme}, {job.case.rule} kept"
                    bar.set_description(f"weights {job.case.weights}" if job.case.weights else how)
                    if missing := job.missing(rows):
                        loss, divergence = run(job.case, missing)
                        if job.loss is not None:
                            job.loss[missing] = loss
                        job.divergence[missing] = divergence
                        bar.update(len(missing))
                        grew()

        bar.update(total - sum(int(job.divergence.isnan().sum()) for job in jobs) - _later(result))
        go(jobs)
        if result.cell_layer is not None:
            if bool((result.cell_layer < 0).any()):
                _choose_cells(result, run)
            go(_of_cells(result))
            go([_of_list(result, run.layers)])


def _later(result: Precision) -> int:
    later = [x for x in (result.cell_divergence, result.listed_divergence) if x is not None]
    return sum(int(x.isnan().sum()) for x in later)


def _by_scheme(result: Precision, layers: tuple[int, ...]) -> list[_Job]:
    jobs = []
    for s, name in enumerate(result.schemes):
        scheme = Scheme.parse(name)
        every = dict.fromkeys(result.tensors, layers)
        for k, rule in enumerate(result.kept):
            case = _Case(scheme, every, rule)
            jobs.append(_Job(case, result.quantised_loss[s, k], result.divergence[s, k]))
        for t, tensor in enumerate(result.tensors):
            alone = _Case(scheme, {tensor: layers})
            jobs.append(_Job(alone, result.alone_loss[s, t], result.alone_divergence[s, t]))
            rest = _Case(scheme, {other: layers for other in every if other != tensor})
            if rest.where:
                given = result.without_loss[s, t], result.without_divergence[s, t]
                jobs.append(_Job(rest, *given))
    return jobs


def _of_weights(result: Precision) -> list[_Job]:
    return [
        _Job(
            _Case(Scheme(), {}, weights=name), result["weight_loss"][at],
            result["weight_divergence"][at],
        )
        for at, name in enumerate(result.weights or ())
    ]  # fmt: skip


def _of_map(result: Precision, layers: tuple[int, ...]) -> list[_Job]:
    if result.map_loss is None or result.map_divergence is None:
        return []
    scheme = Scheme.parse(result.mapped)
    return [
        _Job(
            _Case(scheme, {tensor: (layer,)}, state),
            result.map_loss[s, layer, t],
            result.map_divergence[s, layer, t],
        )
        for layer in layers
        for t, tensor in enumerate(result.tensors)
        for s, state in enumerate(STATES)
    ]


def _choose_cells(result: Precision, run: _Run) -> None:
    """Choose the cells with the largest loss with the sinks kept, and their largest channels."""
    order = result["map_divergence"][1].double().mean(-1).flatten().argsort(descending=True)
    few = result["cell_divergence"].shape[1]
    size = run.channel_sizes(result.tensors, few, SINKS)
    for cell, index in enumerate(order[: len(result["cell_layer"])].tolist()):
        layer, tensor = divmod(index, len(result.tensors))
        largest = size[layer, result.tensors[tensor]].argsort(descending=True)[:CHANNELS]
        result["cell_channel"][cell, : len(largest)] = largest
        result["cell_tensor"][cell], result["cell_layer"][cell] = tensor, layer


def _of_cells(result: Precision) -> list[_Job]:
    jobs = []
    scheme = Scheme.parse(result.mapped)
    for cell, layer in enumerate(result["cell_layer"].tolist()):
        tensor = result.tensors[int(result["cell_tensor"][cell])]
        channels = result["cell_channel"][cell]
        kept = {(layer, tensor): tuple(channels[channels >= 0].tolist())}
        case = _Case(scheme, {tensor: (layer,)}, SINKS, kept)
        jobs.append(_Job(case, None, result["cell_divergence"][cell]))
    return jobs


def _of_list(result: Precision, layers: tuple[int, ...]) -> _Job:
    whole, channels = _listed(result.cells(), result.tolerance)
    where = {
        tensor: tuple(layer for layer in layers if (layer, tensor) not in whole)
        for tensor in result.tensors
    }
    where = {tensor: rest for tensor, rest in where.items() if rest}
    case = _Case(Scheme.parse(result.mapped), where, SINKS, channels)
    return _Job(case, result["listed_loss"], result["listed_divergence"])


class _Run:
    """Runs cases on some prompts of one length, and compares them with full precision.

    Args:
        model: A bridge.
        prompts: Right-padded.
        how: The attention path.
        marks: The tokens that each rule keeps.
        ends: Ranges of static schemes, for each rule.
    """

    def __init__(
        self,
        model: Any,
        prompts: Texts,
        how: paths.Path,
        marks: Mapping[str, Marks],
        ends: Mapping[str, Mapping[tuple[int, str], Ends]],
    ) -> None:
        self._model, self._prompts, self._how = model, prompts, how
        self._marks, self._ends = marks, ends
        self._caps = capabilities(model)
        self.layers = tuple(range(self._caps.n_layers))
        self._device = input_device(model)
        try:
            self._partway: Partway | None = Partway(model)
        except UnsupportedError:  # starting at a later block is not exact: whole passes
            self._partway = None
        self._full: dict[int, Tensor] = {}
        self._before: tuple[tuple[int, ...], Track] | None = None
        self._known: dict[Any, Losses] = {}

    def groups(self) -> list[list[int]]:
        """Return groups of prompts of equal length, so that there is no padding."""
        lengths = self._prompts.lengths
        room = _LOGITS.get(self._device.type, _LOGITS["cpu"]) // self._caps.d_vocab
        result = []
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero().flatten()
            result += [part.tolist() for part in rows.split(max(1, room // length))]
        return result

    def begin(self, rows: list[int]) -> Float[Tensor, "prompt"]:
        """Keep the predictions of these prompts in full precision, and return their losses."""
        self._full.clear()
        self._known.clear()
        self._before = None
        with self._opened():
            logits = self._logits(rows, 0)
        for row, one in zip(rows, logits, strict=True):
            self._full[row] = one.float().log_softmax(-1)
        return torch.stack([_nll(self._full[row], self._tokens([row])[0]) for row in rows])

    def __call__(self, case: _Case, rows: list[int]) -> Losses:
        """Return loss and divergence of some of the prompts given to `begin`."""
        marked = self._marks[case.rule][:, rows, : self._length(rows)]
        key = (
            case.scheme,
            tuple(case.where.items()),
            tuple(case.channels.items()),
            case.weights,
            case.rule if case.scheme.static else None,
            tuple(rows),
            marked.numpy().tobytes(),
        )
        if key not in self._known:  # two rules may mark the same tokens
            with self._opened(), ExitStack() as stack:
                before = self._state(rows, case.start)
                for edit in self._edits(case):
                    edit.mark(marked)
                    stack.enter_context(edit)
                if case.weights:
                    short = self._tokens(rows[:1])[:, :2]
                    stack.enter_context(
                        quantised_weights(self._model, case.weights, lambda: self._model(short))
                    )
                self._known[key] = self._compared(rows, self._logits(rows, case.start, before))
        return self._known[key]

    def channel_sizes(
        self, tensors: list[str], prompts: int, rule: str
    ) -> dict[tuple[int, str], Float[Tensor, "channel"]]:
        """Return the largest |x| of every channel over the tokens that a rule does not keep.

        Args:
            tensors: Which.
            prompts: Over how many of the first prompts.
            rule: The rule whose tokens are left out.
        """
        width = int(self._prompts.lengths[:prompts].max())
        few = Texts(
            self._prompts.tokens[:prompts, :width],
            self._prompts.mask[:prompts, :width],
            self._prompts.bos,
            self._prompts.source,
        )
        marked = self._marks[rule][:, :prompts, :width]
        with self._how.opened():
            ends = channel_ends(self._model, few, tensors, marked=marked)
        return {where: torch.maximum(low.abs(), high.abs()) for where, (low, high) in ends.items()}

    def _opened(self) -> ExitStack:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(runner.evaluating(self._model))
            stack.enter_context(self._how.opened())
            return stack.pop_all()

    def _length(self, rows: list[int]) -> int:
        return int(self._prompts.lengths[rows[0]])

    def _tokens(self, rows: list[int]) -> Int[Tensor, "prompt position"]:
        return self._prompts.tokens[rows, : self._length(rows)].to(self._device)

    def _edits(self, case: _Case) -> list[Quantise]:
        """Return one per set of layers, since tensors may be quantised in different layers."""
        ends = self._ends[case.rule] if case.scheme.static else None
        return [
            Quantise(
                self._model,
                case.scheme,
                tensor,
                layers,
                channels={at: which for at, which in case.channels.items() if at[1] == tensor},
                calibration=ends,
            )
            for tensor, layers in case.where.items()
        ]

    def _state(self, rows: list[int], start: int) -> Tensor | None:
        """Return the input of the first quantised layer in full precision; None for a full pass."""
        if start == 0 or self._partway is None:
            return None
        if self._before is None or self._before[0] != tuple(rows):
            tokens = self._tokens(rows)
            mask = torch.ones_like(tokens, dtype=torch.bool)
            self._before = tuple(rows), self._partway.track(tokens, mask)
        return self._before[1].before[start]

    def _logits(
        self, rows: list[int], start: int, state: Tensor | None = None
    ) -> Float[Tensor, "prompt position vocab"]:
        tokens = self._tokens(rows)
        if state is None or self._partway is None:
            return self._model(tokens, return_type="logits", use_cache=False)
        return self._partway.logits(tokens, start, state)

    def _compared(self, rows: list[int], logits: Tensor) -> Losses:
        loss, divergence = [], []
        for row, one in zip(rows, logits, strict=True):
            now, full = one.float().log_softmax(-1), self._full[row].to(one.device)
            loss.append(_nll(now, self._tokens([row])[0]))
            kl = torch.nn.functional.kl_div(now[:-1], full[:-1], reduction="none", log_target=True)
            kl = kl.masked_fill(full[:-1].isinf(), 0)  # a token that is never predicted
            divergence.append(kl.sum(-1).double().mean().clamp(min=0).float().cpu())
        return torch.stack(loss), torch.stack(divergence)


def _nll(log_probability: Tensor, tokens: Tensor) -> Float[Tensor, ""]:
    """Mean loss of a prompt's predictions."""
    targets = tokens[1:, None].to(log_probability.device)
    return -log_probability[:-1].gather(1, targets).double().mean().float().cpu()
