"""Give every public door what it cannot take, and write down what it says (see test_doors.py).

Run in a process of its own: in the tests' own process annotations are checked before any function
runs, so that a wrong type would never reach the function.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import sinkscope as ss
from sinkscope import interventions as edits
from tests.families.architectures import BY_NAME

WRONG = {
    "None": None, "True": True, "1.5": 1.5, "x": "x", "empty": "", "-1": -1, "10**30": 10**30,
    "nan": float("nan"), "inf": float("inf"), "[]": [], "[None]": [None], "[1.5]": [1.5],
    "{}": {}, "object": object(), "array": np.array([1.5]), "array of text": np.array(["a"]),
    "0-d": torch.tensor(1.5), "2-d": torch.zeros(2, 2), "bytes": b"x", "complex": 1j,
}  # fmt: skip

ALLOWED = {
    "scan metrics": ["[]", "{}"],
    "token_mask residual_ratio": ["1.5", "10**30", "0-d"],
    "token_mask attention": ["1.5", "10**30", "0-d"],
    "nonmixture_dims over_median": ["1.5", "10**30", "0-d"],
    "nonmixture_dims over_mixed": ["1.5", "10**30", "0-d"],
    "texts prompts": ["None"],
    "texts length": ["None"],
    "texts windows": ["None", "True"],
    "texts key": ["x", "empty"],
    "token_ids mask": ["None"],
    "head_map theme": ["None"],
    "to_html": ["None"],
    "load_model device": ["None"],
    "load_model dtype": ["None"],
    "scan devices": ["None"],
    "precision tensors": ["None"],
    "precision sinks": ["None"],
    "precision first": ["[]"],
    "precision tolerance": ["1.5", "10**30", "0-d"],
    "precision weights": ["[]", "{}"],
    "precision mapped": ["None", "empty"],
    "rotary_precision dtypes": ["None"],
    "rotary_precision keep": ["empty"],
    "transplant erase": ["True"],
    "vocabulary threshold": ["1.5", "10**30", "0-d"],
    "vocabulary sample": ["None"],
    "experts minimum": ["1.5", "10**30", "0-d"],
    "experts ratio": ["1.5", "10**30", "0-d"],
    "experts percentile": ["1.5", "0-d"],
    "Monitor metrics": ["[]", "{}"],
}
"""What a door takes although it is listed as wrong."""


def with_(call: Callable[..., Any], name: str, **rest: Any) -> Callable[[Any], Any]:
    """A call of which one argument is missing; another value of it in `rest` is left out."""
    others = {key: value for key, value in rest.items() if key != name}
    return lambda value: call(**others, **{name: value})


def doors(folder: str) -> dict[str, Callable[[Any], Any]]:
    """Calls of one value each; `folder` is for what a sweep would write."""
    model = ss.load_model(BY_NAME["llama"].build())
    ids = BY_NAME["llama"].tokens(prompts=2, length=8).tolist()
    report = ss.scan(model, ids, progress=False)

    found: dict[str, Callable[[Any], Any]] = {}
    for name in ("sinks", "epsilon", "batch", "metrics"):
        found[f"scan {name}"] = with_(ss.scan, name, model=model, texts=ids, progress=False)
    for name in ("level", "resamples", "seed"):
        found[f"interval {name}"] = lambda value, name=name: report.interval(
            "honor", **{name: value}
        )
    for name in ("n", "by"):
        found[f"top_heads {name}"] = with_(report.top_heads, name)
    for name in ("residual_ratio", "attention"):
        found[f"token_mask {name}"] = with_(report.token_mask, name)
    for name in ("over_median", "over_mixed", "share"):
        found[f"nonmixture_dims {name}"] = with_(report.nonmixture_dims, name)
    for name in ("prompts", "length", "bos", "seed"):
        found[f"random_tokens {name}"] = lambda value, name=name: ss.random_tokens(
            **{name: value}
        ).tokenize(model)
    for name in ("prompts", "length", "seed"):
        found[f"repeated_tokens {name}"] = with_(ss.repeated_tokens, name)
    for name in ("prompts", "length", "bos", "seed", "padding", "windows", "key"):
        found[f"texts {name}"] = with_(ss.texts, name, source="prose")
    found |= {
        "scan texts": lambda value: ss.scan(model, value, progress=False),
        "texts source": ss.texts,
        "token_ids": ss.token_ids,
        "token_ids mask": lambda value: ss.token_ids(ids, value),
        "read_token_ids": ss.read_token_ids,
        "field": lambda value: report[value],
        "mean": report.mean,
        "to_frame": report.to_frame,
        "sink_rate_at": report.sink_rate_at,
        "save": report.save,
        "to_html": report.to_html,
        "load_report": ss.load_report,
        "compare": lambda value: ss.compare(report, value),
        "ReplaceStart token": lambda value: ss.ReplaceStart(model, value),
        "ReplaceStart seed": lambda value: ss.ReplaceStart(model, 5, value),
        "SelfOnlyMask position": lambda value: edits.SelfOnlyMask(model, value),
        "AblateHeads": lambda value: edits.AblateHeads(model, value),
        "set_theme": ss.plot.set_theme,
        "head_map theme": lambda value: ss.plot.head_map(report, theme=value),
        "load_model": ss.load_model,
        "load_model device": lambda value: ss.load_model("bb-3l", device=value),
        "load_model dtype": lambda value: ss.load_model("bb-3l", dtype=value),
    }
    found |= experiments(model, ss.token_ids(ids), folder)
    plot = ss.plot
    for door in (
        *("head_map", "head_scatter", "residual_norms", "value_drains", "attention_by_query"),
        *("nonmixture_dims", "massive_activations", "position_map", "token_strip", "sink_rate"),
        *("sink_rate_by_length", "position_embedding_norms"),
    ):
        found[door] = getattr(plot, door)
    for door in (
        *("perplexity_along", "perplexity_by_window", "ablation_effect", "loss_by_share_ablated"),
        *("bench_ratios", "peak_trace", "mitigations", "knockout_risks", "training_curves"),
    ):
        found[door] = with_(getattr(plot, door), "frame", about="a line")
    found |= {
        "by_layer": lambda value: plot.by_layer(value, "sink_attention"),
        "by_position": lambda value: plot.by_position(value, layer=0),
        "before_after": lambda value: plot.before_after(value, "sink_attention", about="a line"),
        "head_change before": lambda value: plot.head_change(value, report),
        "head_change after": lambda value: plot.head_change(report, value),
        "head_map metric": lambda value: plot.head_map(report, value),
    }
    return found


def experiments(model: Any, texts: ss.Texts, folder: str) -> dict[str, Callable[[Any], Any]]:
    """Sweeps, monitors and each argument of the experiments, the others being valid."""
    from sinkscope import experiments as ex

    def each(door: str, call: Callable[..., Any], names: str, **rest: Any) -> None:
        for name in names.split():
            found[f"{door} {name}"] = with_(call, name, **rest)

    found: dict[str, Callable[[Any], Any]] = {}
    quiet = dict(model=model, texts=texts, progress=False)
    each("scan", ss.scan, "nulls devices attention", **quiet)
    each("sink_life", ex.life.sink_life, "sink most_removed", **quiet)
    each(
        "precision",
        ex.precision.precision,
        "schemes tensors sinks first map_prompts tolerance weights mapped",
        schemes="int8-tensor",
        **quiet,
    )
    rotary = ex.rotary_precision.rotary_precision
    each("rotary_precision", rotary, "shifts dtypes keep", shifts=[16], **quiet)
    each("transplant", ex.transplant.transplant, "donor erase conditions", **quiet)
    drawn = "threshold sample further pairs bos seed"
    each("vocabulary", ex.vocabulary.vocabulary, drawn, **quiet)
    routed = ss.load_model(BY_NAME["mixtral"].build())
    rule = "sink minimum ratio percentile share seed"
    each("experts", ex.experts.experts, rule, **quiet | {"model": routed})
    asked = (
        "models texts out lengths metrics interventions prompts sinks epsilon attention batch "
        "device dtype workers num_gpus num_cpus"
    )
    cells = dict(models="bb-3l", texts="random", lengths=8, prompts=1, progress=False)
    each("sweep", ss.sweep, asked, out=folder, **cells)
    found["open_sweep"] = ss.open_sweep
    each("Monitor", ss.Monitor, "texts metrics sinks epsilon", model=model, texts=texts)
    each("SinkCallback", ss.SinkCallback, "every", texts=texts)
    return found


def main() -> None:
    """One JSON object: door to value to [class, bases, message], or null where it was taken."""
    warnings.simplefilter("ignore")
    said: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for door, call in doors(folder).items():
            said[door] = {}
            for name, value in WRONG.items():
                if name in ALLOWED.get(door, []):
                    continue
                try:
                    call(value)
                    said[door][name] = None
                except Exception as error:
                    kinds = [kind.__name__ for kind in type(error).__mro__]
                    said[door][name] = [type(error).__name__, kinds, str(error)]
    json.dump(said, sys.stdout)


if __name__ == "__main__":
    main()
