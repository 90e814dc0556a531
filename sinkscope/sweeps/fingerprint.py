"""What the values of a cell depend on, determined before its model is loaded.

The request of a cell (see `experiments.resume`) contains the model by its weights, the texts by
their content, the interventions, the metrics, and the version of sinkscope. Its hash is the cell's
name, so that a changed setting makes a new cell and a copied folder of weights does not. As in
merging reports, the device and the versions of other libraries are not included; the report records
them.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

from sinkscope.capture import observers
from sinkscope.errors import ModelError, SinkscopeError
from sinkscope.experiments.resume import Request, kept_in, texts_identity
from sinkscope.models.hub import find_on_hub
from sinkscope.models.load import load_model, revision_of
from sinkscope.models.packaged import BUILT_IN, PACKAGES, cache_dir, sha256
from sinkscope.models.provenance import model_identity
from sinkscope.output import as_json, write_file
from sinkscope.report.settings import library_versions
from sinkscope.sweeps.grid import SCAN, Case, Model

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
_BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")
_OF_TRAINING = ("trainer_state.json", "training_args.bin", "optimizer.bin", "scheduler.bin")


class Fingerprints:
    """Makes requests of cells; the hash of each model's files is cached while they are unchanged.

    Args:
        place: The sweep's folder, for messages.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._weights: dict[str, dict[str, Any]] = {}
        self._texts: dict[int, str] = {}
        self._files = _Hashes()

    def request(self, case: Case) -> Request:
        """Return everything that the case's values depend on.

        Raises:
            ModelError: If its model does not exist.
            ReportError: If the model is in memory and hooks are on it.
        """
        task = {"experiment": case.task.experiment, **case.task.options}
        if case.task.experiment == SCAN:
            task["own"] = _own_metrics(case.task.options["metrics"])
        return {
            "model": self._model(case.model),
            "texts": self._text(case.texts),
            "interventions": [[one.name, one.arguments] for one in case.applied],
            "task": task,
            "sinkscope": library_versions()["sinkscope"],
        }

    def save(self) -> None:
        """Save the hashes of files for the next sweep."""
        self._files.save()

    def _model(self, model: Model) -> dict[str, Any]:
        if model.key not in self._weights:
            self._weights[model.key] = self._look_up(model)
        return self._weights[model.key]

    def _look_up(self, model: Model) -> dict[str, Any]:
        if model.in_memory:
            bridge = load_model(model.spec)
            kept_in(self._place, bridge)
            return {"identity": model_identity(bridge)}
        options = {name: model.options[name] for name in sorted(model.options)}
        where = {name: options.pop(name, None) for name in ("revision", "checkpoint")}
        options = {"dtype": "float32", **options}
        if "tokenizer" in options:
            options["tokenizer"] = self._tokenizer(str(options["tokenizer"]))
        return {"weights": self._weights_of(str(model.spec), **where), **options}

    def _weights_of(self, spec: str, revision: str | None, checkpoint: int | None) -> str:
        if spec in BUILT_IN:
            return f"{spec} of sinkscope"
        if spec in PACKAGES:
            return f"sha256:{PACKAGES[spec].sha256}"
        path = Path(spec).expanduser()
        if path.is_file():
            return f"sha256:{self._files.of(path)}"
        if path.is_dir():
            return f"sha256:{self._folder(path)}"
        if path.is_absolute() or spec.startswith((".", "~")) or path.suffix in (".gguf", ".nc"):
            raise ModelError(f"There is no file or folder {spec}.")
        if checkpoint is not None:
            revision = revision_of(spec, revision, checkpoint)
        return f"{spec} at {find_on_hub(spec, revision, 'give a model folder.').revision}"

    def _folder(self, folder: Path) -> str:
        """Hash the weights, settings and tokenizer in a folder, independently of its name."""
        patterns = (*_WEIGHTS, *_BESIDE)
        files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
        files = [file for file in files if file.is_file() and file.name not in _OF_TRAINING]
        if not files:
            raise ModelError(f"The folder {folder} holds no weights; give a model's folder.")
        lines = "".join(f"{self._files.of(file)}  {file.name}\n" for file in files)
        return hashlib.sha256(lines.encode()).hexdigest()

    def _tokenizer(self, name: str) -> str:
        path = Path(name).expanduser()
        return self._folder(path) if path.is_dir() else name

    def _text(self, source: Any) -> str:
        if id(source) not in self._texts:
            self._texts[id(source)] = texts_identity(source)
        return self._texts[id(source)]


def name_of(request: Request) -> str:
    """Return the name of a cell's files: twenty hexadecimal digits of its request's hash."""
    plain = json.dumps(json.loads(as_json(request)), sort_keys=True)
    return hashlib.sha256(plain.encode()).hexdigest()[:20]


def _own_metrics(metrics: list[str]) -> dict[str, str]:
    """Hash the source of each user-defined metric.

    Raises:
        SinkscopeError: If its source cannot be found.
    """
    sources = {}
    for metric, kinds in observers.metrics().items():
        own = [kind for kind in kinds if not kind.__module__.startswith("sinkscope.")]
        if not own or ("all" not in metrics and metric not in metrics):
            continue
        try:
            source = "\n".join(map(inspect.getsource, own))
        except (OSError, TypeError) as error:
            raise SinkscopeError(
                f"The metric {metric} is user-defined and its source cannot be found, so its cells "
                f"cannot be distinguished from those of an earlier version; put it into a file."
            ) from error
        sources[metric] = hashlib.sha256(source.encode()).hexdigest()[:16]
    return sources


class _Hashes:
    """SHA-256 of files, computed again only if size or time have changed."""

    def __init__(self) -> None:
        self._file = cache_dir() / "file-hashes.json"
        self._known: dict[str, list[Any]] = {}
        self._new = False
        try:
            self._known = dict(json.loads(self._file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # missing or damaged: start a new one
            pass

    def of(self, path: Path) -> str:
        """Return the file's hash.

        Raises:
            ModelError: If it cannot be read.
        """
        try:
            path = path.resolve()
            stat = path.stat()
            stamp = [stat.st_size, stat.st_mtime_ns]
            known = self._known.get(str(path))
            if known is not None and known[:2] == stamp:
                return known[2]
            digest = sha256(path)
        except OSError as error:
            raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
        self._known[str(path)], self._new = [*stamp, digest], True
        return digest

    def save(self) -> None:
        """Write the cache, if possible; without it hashes are computed again."""
        if self._new:
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                write_file(self._file, json.dumps(self._known))
            except (OSError, SinkscopeError):
                return
