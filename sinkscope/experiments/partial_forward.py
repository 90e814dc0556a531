"""Start a forward pass at any block, and compute losses in bounded memory.

1. `Partway` runs the model's own forward pass, so that masks, positions, final norm, output head
   and softcap are unchanged. The blocks before the requested one are skipped: each returns the
   given residual state.
2. Whether that is exact is checked on every model before it is used, since a model may pass more
   from block to block than one residual stream. Active interventions apply as in full passes.
3. `Partway.losses` applies the output head to a few positions at a time; `PromptLosses` is the loss
   of each prompt with some heads set to zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.attention.overrides import Overrides
from sinkscope.capture import batches, paths, runner
from sinkscope.capture.batches import Batch
from sinkscope.devices import in_pieces
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.models.active import hooked
from sinkscope.models.capabilities import Capabilities, capabilities
from sinkscope.models.probe import input_device, only_hooks, probe_tokens
from sinkscope.models.rope import length_class
from sinkscope.models.signals import close
from sinkscope.prompts.tokens import Texts

Hooks = Sequence[tuple[str, Callable[..., Tensor | None]]]
Residual = Float[Tensor, "row position dim"]
Flags = Bool[Tensor, "prompt layer head"]

_LOGITS = {"cuda": 2**28, "cpu": 2**23}
"""Logits held at once: a gigabyte in fp32 on a GPU, 32 MB on a CPU."""
_TOKENS = {"cuda": 2**16, "cpu": 2**12}
"""Tokens of one forward pass."""


@dataclass(frozen=True)
class Track:
    """The residual stream of some prompts, block by block.

    Attributes:
        before: The residual state that each block is given, before hooks on its input.
        final: The residual state after the last block.
    """

    before: tuple[Residual, ...]
    final: Residual


def with_loss(caps: Capabilities) -> Capabilities:
    """Return the capabilities, if the model has a meaningful next-token loss.

    Raises:
        UnsupportedError: If it does not.
    """
    if "loss" in caps.undefined:
        raise UnsupportedError(
            f"{caps.architecture} has no loss to compare: {caps.undefined['loss']}."
        )
    return caps


def with_predictions(prompts: Texts, name: str = "") -> Texts:
    """Return the prompts, if every one has a token to predict.

    Args:
        prompts: Right-padded.
        name: Their name in the error.

    Raises:
        TextError: If one has none.
    """
    shortest = int(prompts.lengths.min())
    if shortest < 2:
        raise TextError(
            f"A prompt of {name or prompts.source} has {shortest} token, which leaves none to "
            "predict; give every prompt two tokens or more."
        )
    return prompts


class Partway:
    """A causal model with a trained output head that can start at any block.

    Args:
        model: A bridge.
        path: How attention runs, see `capture.paths.choose`.

    Raises:
        UnsupportedError: If it has no meaningful loss, or starting at a block is not exact for it.
    """

    def __init__(self, model: Any, path: str = "auto") -> None:
        self.model = model
        self.caps = with_loss(capabilities(model))
        self.device = input_device(model)
        self._path = paths.choose(model, self.caps, path)
        self._outputs: list[int | None] = []
        with self._without_hooks(), self.opened():
            self._check()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Evaluation mode and the chosen attention path; the other methods are called inside."""
        with torch.inference_mode(), runner.evaluating(self.model), self._path.opened():
            yield

    def track(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Bool[Tensor, "row position"],
        hooks: Hooks = (),
    ) -> Track:
        """Run the whole model and keep the residual stream at every block."""
        kept: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            return lambda x, hook: kept.__setitem__(layer, x)

        n_layers = self.caps.n_layers
        # The output of a block rather than the input of the next: edits of a block's input come
        # later, and are applied again when the model starts there.
        observers = [(self.caps.hook("resid_post", i), keep(i + 1)) for i in range(n_layers)]
        observers.append((self.caps.hook("resid_pre", 0), keep(0)))
        self._run(tokens, mask, [*hooks, *observers])
        return Track(tuple(kept[i] for i in range(n_layers)), kept[n_layers])

    def final(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Bool[Tensor, "row position"],
        layer: int = 0,
        residual: Residual | None = None,
        hooks: Hooks = (),
    ) -> Residual:
        """Return the residual state after the last block, with ``residual`` as input of a block.

        Args:
            tokens: The tokens of the residual state.
            mask: True at real tokens.
            layer: The first block that runs.
            residual: Its input; None with ``layer=0``, which reads the embedding.
            hooks: Edits, as `TransformerBridge.hooks` takes them.
        """
        kept: list[Tensor] = []
        end = self.caps.hook("resid_post", self.caps.n_layers - 1)
        last = (end, lambda x, hook: kept.append(x))
        with self._starting_at(layer, residual):
            self._run(tokens, mask, [*hooks, last])
        return kept[0]

    def losses(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Bool[Tensor, "row position"],
        final: Residual,
    ) -> Float[Tensor, "row"]:
        """Mean loss of each row's next-token predictions [nat]; nan where it predicts none.

        The output head runs on a few positions at a time, since the logits would be by far the
        largest tensor. Hooks after the blocks, on the final norm or the logits, need all positions
        at once; the effect of those inside is in the residual state already.
        """
        names = hooked(self.model)
        inside = {name for name in names if name.startswith("blocks.")}
        behind = names != inside
        room = _LOGITS["cuda" if final.is_cuda else "cpu"] // self.caps.d_vocab
        length = tokens.shape[1] - 1
        width = max(1, length if behind else min(room, length))
        columns = []
        for start in range(0, length, width):
            at = slice(start, min(start + width, length) + behind)
            here, after = tokens[:, at], tokens[:, start + 1 : start + width + 1]

            def score(rows: slice, at: slice = at, here: Tensor = here, after: Tensor = after):
                logits = self._logits(here[rows], final[rows, at])[:, : after.shape[1]].float()
                target = logits.gather(-1, after[rows, :, None].to(logits.device))[..., 0]
                return (logits.logsumexp(-1) - target).to(tokens.device)

            with self._without_hooks(inside):
                columns.append(in_pieces(len(tokens), max(1, room // width), score))
        real = mask[:, 1:]
        if not columns:
            return torch.full((len(tokens),), torch.nan, device=tokens.device)
        nll = torch.where(real, torch.cat(columns, dim=1), 0)
        return nll.sum(dim=1) / real.sum(dim=1)

    def logits(
        self, tokens: Int[Tensor, "row position"], layer: int, residual: Residual
    ) -> Float[Tensor, "row position vocab"]:
        """The logits when block ``layer`` is given ``residual``; all of them at once.

        Args:
            tokens: What the residual belongs to, without padding between them.
            layer: The first block that runs; the number of layers for final norm and head alone.
            residual: Its input.
        """
        with self._starting_at(layer, residual):
            return self.model(tokens, return_type="logits", use_cache=False)

    def _logits(
        self, tokens: Int[Tensor, "row position"], final: Residual
    ) -> Float[Tensor, "row position vocab"]:
        """The logits of a residual state: final norm and output head."""
        return self.logits(tokens, self.caps.n_layers, final)

    def _run(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Bool[Tensor, "row position"],
        hooks: Hooks,
    ) -> None:
        with self.model.hooks(fwd_hooks=list(hooks)):
            runner.forward(self.model, self.batch(tokens, mask))

    def batch(
        self,
        tokens: Int[Tensor, "row position"],
        mask: Bool[Tensor, "row position"],
        rows: Int[Tensor, "row"] | None = None,
    ) -> Batch:
        """Return these prompts as a `Batch` for observers, with position 0 as the sink.

        Args:
            tokens: Right-padded token ids.
            mask: True at real tokens.
            rows: Their indices among the prompts of the text.
        """
        sinks = torch.zeros_like(mask)
        sinks[:, 0] = True
        all_rows = torch.arange(len(tokens))
        batch = batches.cut(tokens, mask, sinks, all_rows, causal=True, device=self.device)
        return batch if rows is None else dataclasses.replace(batch, rows=rows)

    def observers(
        self, batch: Batch, signals: Iterable[str], emit: Callable[[str, int, Any], None]
    ) -> Hooks:
        """Hooks that read signals of every layer of one batch, for `final`.

        Args:
            batch: The batch that runs.
            signals: "attention", or names of activations, see `Capabilities`.
            emit: Called with signal, layer, and the activation or the attention's reader.
        """
        wanted = paths.Wanted(frozenset(signals), frozenset({"entropy"}))
        return self._path.hooks(wanted, lambda: batch, emit)

    @contextmanager
    def _starting_at(self, layer: int, residual: Residual | None) -> Iterator[None]:
        """Context in which the blocks below ``layer`` return ``residual`` instead of computing."""
        overrides, handles = Overrides(), []

        def give(block: Any, given: Any, output: Any) -> Any:
            # Hooks on these blocks have edited it again, although their edits are already included.
            return (residual, *output[1:]) if isinstance(output, tuple) else residual

        try:
            for block, outputs in zip(self.model.blocks[:layer], self._outputs, strict=False):
                # Blocks return a tensor, or a tuple that begins with it.
                out = residual if outputs is None else (residual, *[None] * (outputs - 1))
                overrides.attribute(
                    block.original_component, "forward", lambda *args, out=out, **options: out
                )
                handles.append(block.register_forward_hook(give))
            yield
        finally:
            overrides.undo()
            for handle in handles:
                handle.remove()

    def _without_hooks(self, names: Iterable[str] | None = None) -> AbstractContextManager[None]:
        """Temporarily remove the caller's hooks from the named hook points, or from all."""
        points = self.model.hook_dict
        chosen = [points[name] for name in (points if names is None else names)]
        return only_hooks(chosen, (), lambda x, hook: None)

    def _check(self) -> None:
        """Refuse a model whose result changes when it starts at a later block.

        Raises:
            UnsupportedError: If it does.
        """
        tokens = probe_tokens(self.model).to(self.device)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        returned: list[int | None] = []

        def count(block: Any, given: Any, output: Any) -> None:
            returned.append(len(output) if isinstance(output, tuple) else None)

        handles = [b.original_component.register_forward_hook(count) for b in self.model.blocks]
        try:
            track = self.track(tokens, mask)
        finally:
            for handle in handles:
                handle.remove()
        self._outputs = returned
        half = self.model.cfg.dtype in (torch.float16, torch.bfloat16)
        tolerance = 3e-2 if half else 1e-4
        plain = self.model(tokens, return_type="logits", use_cache=False)
        same = close(self._logits(tokens, track.final).float(), plain.float(), tolerance)
        # The prompts are permuted between runs. Otherwise a value that a later block reads from a
        # skipped one would be that of the previous run, and match by coincidence.
        for layer in range(self.caps.n_layers):
            order = [1, 0] if layer % 2 == 0 else [0, 1]
            again = self.final(tokens[order], mask, layer, track.before[layer][order])
            same = same and close(again.float(), track.final[order].float(), tolerance)
        if not same:
            raise UnsupportedError(
                f"{self.caps.architecture} does not give the same result when it starts at one of "
                "its blocks, so its heads cannot be ablated this way; AblateHeads ablates them in "
                "whole forward passes."
            )


class PromptLosses:
    """The next-token loss of each prompt with some of its heads set to zero.

    Args:
        partway: The model, opened.
        prompts: Right-padded.
        batch: Prompts per batch; by default as many as fit on the device.
    """

    def __init__(self, partway: Partway, prompts: Texts, batch: int | None = None) -> None:
        self._partway = partway
        self._tokens, self._mask = prompts.tokens, prompts.mask
        room = _TOKENS.get(partway.device.type, _TOKENS["cpu"]) // self._tokens.shape[1]
        classes = batches.classes(self._mask, length_class(partway.model.original_model))
        order = batches.by_length(self._mask)
        self._batches = list(batches.together(order, classes, batch or max(1, room)))

    def __call__(self, ablated: Flags | None = None) -> Float[Tensor, "prompt"]:
        """The loss of each prompt when the output of these heads is zero at every position.

        Args:
            ablated: Which heads of which prompts [prompt layer head]; none by default.
        """
        return self.run(lambda batch: [] if ablated is None else self._zero(ablated[batch.rows]))

    def run(self, hooks: Callable[[Batch], Hooks]) -> Float[Tensor, "prompt"]:
        """The loss of each prompt under hooks that are made for every batch.

        Args:
            hooks: From a batch to edits, as `TransformerBridge.hooks` takes them.
        """
        loss = torch.full((len(self._tokens),), torch.nan)
        partway = self._partway
        for rows in self._batches:
            length = int(self._mask[rows].sum(dim=1).max())
            tokens, mask = (x[rows, :length].to(partway.device) for x in (self._tokens, self._mask))
            batch = partway.batch(tokens, mask, rows)
            final = partway.final(tokens, mask, hooks=hooks(batch))
            loss[rows] = partway.losses(tokens, mask, final).cpu()
        return loss

    def _zero(self, ablated: Flags) -> Hooks:
        def zero(layer: int) -> Callable[..., Tensor]:
            here = rearrange(ablated[:, layer], "prompt head -> prompt 1 head 1")
            return lambda z, hook: z.masked_fill(here.to(z.device), 0)

        layers = ablated.any(dim=2).any(dim=0).nonzero()[:, 0].tolist()
        return [(self._partway.caps.hook("z", layer), zero(layer)) for layer in layers]
