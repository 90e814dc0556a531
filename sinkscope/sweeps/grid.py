"""The grid of a sweep: models, texts, interventions, and what to measure.

`axes` reads what Python or a YAML file names; `combined` gives every combination as a `Case`, which
has not been looked up yet: no model is loaded and no text is tokenised.
"""

from __future__ import annotations

import dataclasses
import glob
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from sinkscope import interventions as known_interventions
from sinkscope.capture import observers
from sinkscope.capture.scan import checked
from sinkscope.errors import SinkscopeError, TextError
from sinkscope.experiments.dynamics import is_snapshot, load_snapshot
from sinkscope.interventions.base import Intervention
from sinkscope.models.load import chosen_dtype, load_model
from sinkscope.models.packaged import BUILT_IN, PACKAGES
from sinkscope.output import listed
from sinkscope.prompts.documents import read_text
from sinkscope.prompts.recipes import TextSource
from sinkscope.prompts.texts import as_texts
from sinkscope.prompts.texts import texts as make_texts
from sinkscope.prompts.tokens import Texts
from sinkscope.validation import shown, whole_number

COLUMNS = ("model", "checkpoint", "texts", "length", "intervention", "experiment")
"""The columns of the grid."""

SCAN = "scan"
"""Name of a cell without an experiment."""


@dataclass(frozen=True)
class Model:
    """A model of a sweep.

    Attributes:
        label: Its name in the grid's column, shared by checkpoints of one model.
        checkpoint: Training step, if it is known.
        spec: What `load_model` takes, or a snapshot of the toy model.
        options: Options of `load_model`, without the device.
    """

    label: str
    checkpoint: int | None
    spec: Any
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def in_memory(self) -> bool:
        """Whether it is a model rather than the name of one."""
        return isinstance(self.spec, nn.Module)

    @cached_property
    def key(self) -> str:
        """A key that is equal for models with the same weights and options."""
        spec = f"object {id(self.spec)}" if self.in_memory else str(self.spec)
        return json.dumps([spec, self.options], sort_keys=True, default=str)

    def load(self, device: str | None) -> Any:
        """The bridge."""
        if self.in_memory:
            return load_model(self.spec)
        if is_snapshot(self.spec):
            on = {} if device is None else {"device": device}
            return load_snapshot(Path(self.spec), **on, **self.options)
        placed = {} if self.options.get("device_map") else {"device": device}
        return load_model(self.spec, **placed, **self.options)


@dataclass(frozen=True)
class Applied:
    """An intervention by name, with JSON-compatible arguments.

    Attributes:
        name: Name of the class in `sinkscope.interventions`.
        arguments: All but the model.
    """

    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.arguments.items())
        return f"{self.name}({inside})"

    def on(self, model: Any) -> Intervention:
        """Return the intervention on a bridge, not entered yet."""
        return getattr(known_interventions, self.name)(model, **self.arguments)


@dataclass(frozen=True)
class Task:
    """What is measured in every cell: a scan, or one experiment.

    Attributes:
        experiment: "scan", or an experiment as "trace_peak" or "ablation.ablate_heads".
        options: Options of `scan` or of the experiment.
    """

    experiment: str
    options: dict[str, Any]

    def function(self) -> Any:
        """Return the experiment's function.

        Raises:
            SinkscopeError: If there is none of that name.
        """
        from sinkscope import experiments

        module_name, _, name = self.experiment.partition(".")
        module = (
            getattr(experiments, module_name, None) if module_name in dir(experiments) else None
        )
        function = getattr(module, name or module_name, None)
        if not inspect.isfunction(function) or function.__name__.startswith("_"):
            raise SinkscopeError(
                f"There is no experiment {self.experiment!r}; name one of "
                f'{", ".join(dir(experiments))}, or a function of one as "ablation.ablate_heads".'
            )
        first = list(inspect.signature(function).parameters)[:2]
        if first != ["model", "texts"]:
            raise SinkscopeError(
                f"The experiment {self.experiment} takes {' and '.join(first)}, and a sweep gives "
                "each cell a model and texts; call it by itself."
            )
        return function


@dataclass(frozen=True)
class Case:
    """One combination of the grid."""

    model: Model
    label: str
    texts: TextSource | Texts
    applied: tuple[Applied, ...]
    task: Task

    @property
    def columns(self) -> dict[str, Any]:
        """Return the values of the grid's columns."""
        exact = isinstance(self.texts, Texts)
        return {
            "model": self.model.label,
            "checkpoint": self.model.checkpoint,
            "texts": self.label,
            "length": self.texts.tokens.shape[1] if exact else self.texts.length,
            "intervention": " + ".join(map(str, self.applied)) or "none",
            "experiment": self.task.experiment,
        }

    def interventions(self, model: Any) -> ExitStack:
        """Return a context in which the case's interventions are active on a bridge."""
        stack = ExitStack()
        try:
            for applied in self.applied:
                stack.enter_context(applied.on(model))
        except BaseException:
            stack.close()
            raise
        return stack


def read_file(path: str | Path) -> dict[str, Any]:
    """Read the arguments of `sweep` from a YAML file.

    Raises:
        SinkscopeError: If it cannot be read, or is not a mapping.
    """
    try:
        content = yaml.safe_load(read_text(Path(path)))
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # nested too deep; 2020-99-99
        reason = " ".join(str(error).split())
        raise SinkscopeError(f"The sweep file {path} is not YAML: {reason}.") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise SinkscopeError(
            f"The sweep file {path} holds {shown(content)}; expected names with values, such as "
            "models: [smollm2-135m]."
        )
    return content


# -- models ----------------------------------------------------------------------------------------

_STEP = re.compile(r"(?:step|checkpoint|ckpt)[-_]?(\d+)(?:\.safetensors)?$")
_SECURITY = ("trust_remote_code", "allow_pickle")
_OPTIONS = ("dtype", "revision", "checkpoint", "tokenizer", "device_map", *_SECURITY)
_SERIES = ("revision", "checkpoint")


def models_of(given: Any, **common: Any) -> list[Model]:
    """Return the models of an argument.

    Args:
        given: One model, a list of them, or a mapping from label to model. A model is what
            `load_model` takes, a snapshot of the toy model, a pattern such as
            "runs/checkpoint-*", or a mapping with "model" and options of `load_model`, of which
            "revision" and "checkpoint" may be lists.
        common: Default options of all models.

    Raises:
        SinkscopeError: If there is none, or one cannot be understood.
    """
    labelled = isinstance(given, Mapping) and "model" not in given
    pairs = list(given.items()) if labelled else [(None, one) for one in _several(given)]
    common = {name: value for name, value in common.items() if value is not None}
    models = [model for label, one in pairs for model in _models(label, one, common)]
    if not models:
        raise SinkscopeError("models names nothing to measure; name at least one model.")
    return models


def _models(label: str | None, given: Any, common: dict[str, Any]) -> list[Model]:
    options: dict[str, Any] = {}
    if isinstance(given, Mapping):
        options = {name: value for name, value in given.items() if name not in ("model", "label")}
        label, given = given.get("label", label), given.get("model")
        if unknown := [name for name in options if name not in _OPTIONS]:
            raise SinkscopeError(
                f"A model has no option {listed(unknown)}; it may have model, label, "
                f"{listed(_OPTIONS)}."
            )
    label = None if label is None else str(label)
    if isinstance(given, nn.Module):
        if options:
            raise SinkscopeError("A model in memory is measured as it is; give it no options.")
        return [Model(label or type(given).__name__, None, given)]
    if not isinstance(given, str | Path):
        raise SinkscopeError(
            f"A model of a sweep is a name, a path, a mapping with model: in it, or a model in "
            f"memory, not {shown(given)}."
        )
    models = []
    for spec in _expanded(str(given)):
        mine = {} if is_snapshot(spec) else common
        series = [name for name in _SERIES if isinstance(options.get(name), list | tuple)]
        for values in itertools.product(*(options[name] for name in series)):
            chosen = {**mine, **options, **dict(zip(series, values, strict=True))}
            chosen_dtype(chosen.get("dtype"))
            if chosen.get("checkpoint") is not None:
                whole_number("checkpoint", chosen["checkpoint"])
            step = _step(spec, chosen)
            models.append(Model(label or _label(spec, step), step, spec, chosen))
    return models


def _expanded(spec: str) -> list[str]:
    """Expand a pattern to files or folders, sorted by step if their names have one."""
    if not any(mark in spec for mark in "*?["):
        return [spec]
    paths = sorted(glob.glob(spec), key=lambda path: (_step(path, {}) or -1, path))
    if not paths:
        raise SinkscopeError(f"No file or folder is named {spec}.")
    return paths


def _step(spec: str, options: dict[str, Any]) -> int | None:
    if isinstance(options.get("checkpoint"), int):
        return options["checkpoint"]
    if spec in PACKAGES or spec in BUILT_IN:
        return None
    named = _STEP.search(str(options.get("revision") or Path(spec).name))
    return int(named[1]) if named else None


def _label(spec: str, step: int | None) -> str:
    """Return the model's name; for checkpoints in files that of their folder."""
    is_one_of_several = step is not None and _STEP.search(Path(spec).name) is not None
    return str(Path(spec).parent) if is_one_of_several else spec


# -- texts -----------------------------------------------------------------------------------------


def texts_of(given: Any, lengths: Any, prompts: int | None) -> list[tuple[str, TextSource | Texts]]:
    """Return the texts of the arguments, at every length, each with its label.

    Args:
        given: One source, a list of them, or a mapping from label to source. A source is what
            `scan` takes, or a mapping of the arguments of `texts` with "source" in it.
        lengths: Tokens of each prompt; None for each source's own.
        prompts: Default number of prompts of sources.

    Raises:
        TextError: If there is none, or one cannot be understood.
    """
    plain = isinstance(given, Mapping) and "source" not in given and "input_ids" not in given
    pairs = list(given.items()) if plain else [(None, one) for one in _several(given)]
    made = [_source(label, one, prompts) for label, one in pairs]
    wanted = [None] if lengths is None else [_length(one) for one in _several(lengths)]
    if not made or not wanted:
        raise TextError("texts and lengths name nothing to measure; name at least one of each.")
    labels = [label for label, _ in made]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise TextError(
            f"Two texts are called {listed(sorted(twice))}; pass a mapping from label to text."
        )
    return [(label, _as_long(label, source, one)) for label, source in made for one in wanted]


def _source(label: str | None, given: Any, prompts: int | None) -> tuple[str, TextSource | Texts]:
    count = {} if prompts is None else {"prompts": prompts}
    if isinstance(given, Mapping) and "source" in given:
        arguments = {name: value for name, value in given.items() if name != "label"}
        label = given.get("label", label)
        try:
            source: Any = make_texts(**{**count, **arguments})
        except TypeError as error:  # an argument that texts() does not have
            raise TextError(f"A text of the sweep cannot be made: {error}.") from error
    elif isinstance(given, str | Path) and Path(given).suffix != ".json":
        source = make_texts(given, **count)
    else:
        source = as_texts(given)
    named = source.source if isinstance(source, Texts) else source.name
    return named if label is None else str(label), source


def _length(given: Any) -> int | None:
    return None if given is None else whole_number("length", given, at_least=1, error=TextError)


def _as_long(label: str, source: TextSource | Texts, length: int | None) -> TextSource | Texts:
    if length is None:
        return source
    if isinstance(source, Texts):
        raise TextError(
            f"{label} holds exact token ids, which have a length of their own; leave out lengths, "
            "or sweep over these ids by themselves."
        )
    return dataclasses.replace(source, length=length)


# -- interventions and the task --------------------------------------------------------------------


def interventions_of(given: Any) -> list[tuple[Applied, ...]]:
    """Return the interventions of an argument, each alone or several together.

    Args:
        given: A list; each "none" or None, a name, a mapping from name to arguments, or a list of
            these to combine.

    Raises:
        SinkscopeError: If one is unknown, or its arguments are not JSON-compatible.
    """
    if given is None:
        return [()]
    return [_together(one) for one in _several(given)]


def _is_named(given: Any) -> bool:
    return isinstance(given, Mapping)


def _together(given: Any) -> tuple[Applied, ...]:
    if given is None or given == "none":
        return ()
    if isinstance(given, str):
        return (_applied(given, {}),)
    if _is_named(given):
        return tuple(_applied(name, arguments) for name, arguments in given.items())
    if isinstance(given, list | tuple):
        return tuple(applied for one in given for applied in _together(one))
    raise SinkscopeError(
        f"An intervention of a sweep is a name, or a name with arguments, such as "
        f"{{'ZeroValue': {{'positions': 0}}}}, not {shown(given)}."
    )


def _applied(name: str, arguments: Any) -> Applied:
    kind = getattr(known_interventions, name, None) if isinstance(name, str) else None
    known = [
        one
        for one in known_interventions.__all__
        if issubclass(getattr(known_interventions, one), Intervention)
    ]
    if name not in known or kind is None:
        raise SinkscopeError(f"There is no intervention {name!r}; name one of {', '.join(known)}.")
    arguments = arguments or {}
    if not isinstance(arguments, Mapping):
        raise SinkscopeError(
            f"{name} of a sweep takes arguments by name, such as {{'positions': 0}}, not "
            f"{shown(arguments)}."
        )
    try:
        plain = json.loads(json.dumps(dict(arguments), allow_nan=False))
        inspect.signature(kind).bind(None, **plain)
    except (TypeError, ValueError) as error:
        raise SinkscopeError(
            f"{name} cannot have the arguments {shown(dict(arguments))}: {error}."
        ) from error
    return Applied(name, plain)


def task_of(
    experiment: Any, metrics: Any, sinks: Any, epsilon: float, attention: str, batch: Any
) -> Task:
    """Return what every cell measures.

    Args:
        experiment: None for a scan; a name; or a mapping with "name" and the experiment's options.
        metrics: For a scan, like the following; see `scan`.
        sinks: See `scan`.
        epsilon: See `scan`.
        attention: See `scan`.
        batch: See `scan`.

    Raises:
        SinkscopeError: If there is no such experiment, or a scan cannot be asked for that.
    """
    if experiment is None or experiment == SCAN:
        requested, sinks, epsilon, batch = checked(metrics, sinks, epsilon, attention, batch)
        core = observers.core()
        names = [one for name in requested for one in (core if name == "core" else (name,))]
        options = {
            "metrics": list(dict.fromkeys(names)),
            "sinks": sinks if isinstance(sinks, str) else list(sinks),
            "epsilon": epsilon,
            "attention": attention,
            "batch": batch,
        }
        return Task(SCAN, options)
    options = {}
    if isinstance(experiment, Mapping):
        options = {name: value for name, value in experiment.items() if name != "name"}
        experiment = experiment.get("name")
    task = Task(str(experiment), options)
    function = task.function()
    try:
        json.dumps(options, allow_nan=False)
        inspect.signature(function).bind(None, None, **options)
    except (TypeError, ValueError) as error:
        raise SinkscopeError(f"{task.experiment} cannot have these options: {error}.") from error
    return task


def combined(
    models: Iterable[Model],
    texts: Iterable[tuple[str, TextSource | Texts]],
    applied: Iterable[tuple[Applied, ...]],
    task: Task,
) -> list[Case]:
    """Return every combination, model by model."""
    every = itertools.product(models, texts, applied)
    return [Case(model, label, source, under, task) for model, (label, source), under in every]


def _several(given: Any) -> list[Any]:
    """Return one thing or a list of them as a list."""
    if isinstance(given, list | tuple | range | set):
        return list(given)
    return [given]
