"""What transformers itself computes in one eager forward: the oracle of the family tests.

Nothing of TransformerLens or sinkscope is used. Take the reference *before* the model is bridged:
a bridge replaces the model's submodules in place.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .architectures import LLAMA_LIKE, Parts

Record = dict[str, list[Tensor]]


def reference(
    model: PreTrainedModel, tokens: Tensor, mask: Tensor | None = None, parts: Parts = LLAMA_LIKE
) -> dict[str, Tensor]:
    """Run ``model`` once with eager attention and keep what it computes, layer by layer.

    Args:
        model: A transformers model with eager attention that has not been bridged.
        tokens: Token ids [prompt position], right-padded.
        mask: True at real tokens [prompt position]; all real if ``None``.
        parts: Where the architecture keeps its modules.

    Returns:
        ``logits`` [prompt position vocab] and, stacked over layers,

        - ``attentions`` [layer prompt head query key]: probabilities; a learned sink's column is
          dropped, so that rows may sum to less than one;
        - ``scores``, same shape: scaled, softcapped logits before softmax; -inf where not visible;
        - ``visible`` [layer prompt query key]: True where the query may read the key;
        - ``queries``, ``keys``, ``values`` [layer prompt position (kv_)head d_head]: as given
          to the attention function (rotated, normed; OPT has scaled its queries beforehand);
        - ``z`` [layer prompt position head d_head]: what each head passes to W_O;
        - ``attn_out``, ``mlp_out`` [layer prompt position dim]: what is added to the residual;
        - ``resid_pre``, ``resid_post`` [layer prompt position dim]: block inputs and outputs,
          before any final norm; ``hidden_states`` [layer+1 prompt position dim] is both in one;
        - ``latent``, ``normed_latent`` [layer prompt position dim]: what multi-head latent
          attention makes keys and values of, before and after its norm;
        - ``z_out``, ``value_out`` [layer prompt position head]: norms of what the module that
          follows the heads makes of one head's output, and of its value, alone (its bias taken
          off); absent where a gate stands between;
        - ``neurons`` [layer prompt position neuron]: absent for mixtures of experts.
    """
    attention_mask = None if mask is None else mask.long()
    record: Record = {}
    with ExitStack() as stack, torch.no_grad():
        stack.enter_context(_recorded_attention(model, record))
        for block in model.get_submodule(parts.blocks):
            for handle in _record_block(block, parts, record, tuple(tokens.shape)):
                stack.callback(handle.remove)
        output = model(
            input_ids=tokens,
            attention_mask=attention_mask,
            output_attentions=True,
            use_cache=False,
        )
    for ours, theirs in zip(record["attentions"], output.attentions, strict=True):
        assert torch.equal(ours, theirs), "the recorded patterns are not transformers' own"
    result = {name: torch.stack(layers) for name, layers in record.items()}
    if parts.output is not None:  # a gate stands between the heads and W_O
        heads = result["attentions"].shape[2]
        result["z"] = rearrange(result.pop("z before W_O"), "l b t (h d) -> l b t h d", h=heads)
    result["logits"] = output.logits
    result["hidden_states"] = torch.cat([result["resid_pre"][:1], result["resid_post"]])
    return result


@contextmanager
def _recorded_attention(model: PreTrainedModel, record: Record) -> Iterator[None]:
    """Record the arguments and the results of the model's own eager attention function."""
    home = sys.modules[type(model).__module__]
    eager: Callable = home.eager_attention_forward

    def recording(module, query, key, value, attention_mask, scaling=None, **kwargs):
        output, pattern = eager(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = _scores(query, key, scale, _softcap(eager, kwargs))
        visible = _visible(attention_mask, scores)
        _keep(record, "attentions", pattern)
        _keep(record, "scores", scores.masked_fill(~visible, -torch.inf))
        _keep(record, "visible", visible[:, 0].expand(len(query), -1, -1))
        for name, tensor in (("queries", query), ("keys", key), ("values", value)):
            _keep(record, name, rearrange(tensor, "b h t d -> b t h d"))
        _keep(record, "z", output)
        return output, pattern

    with mock.patch.object(home, "eager_attention_forward", recording):
        yield


def _softcap(eager: Callable, kwargs: dict) -> float | None:
    takes_softcap = "softcap" in inspect.signature(eager).parameters
    return kwargs.get("softcap") if takes_softcap else None


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    key = repeat(key, "b k t d -> b (k g) t d", g=query.shape[1] // key.shape[1])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def _visible(attention_mask: Tensor | None, scores: Tensor) -> Tensor:
    """True where a query may read a key [prompt 1 query key]; no mask at all means every key."""
    if attention_mask is None:
        return torch.ones_like(scores[:, :1], dtype=torch.bool)
    if attention_mask.dtype == torch.bool:
        return attention_mask
    return attention_mask > torch.finfo(attention_mask.dtype).min / 2


def _record_block(
    block: nn.Module, parts: Parts, record: Record, shape: tuple[int, int]
) -> Iterator[RemovableHandle]:
    """Forward hooks on one block; the handles that remove them."""

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        # OPT's feed-forward layers see prompts and positions flattened into one axis.
        _keep(record, name, tensor.reshape(*shape, tensor.shape[-1]))

    yield block.register_forward_pre_hook(
        lambda _, args, kwargs: keep("resid_pre", _first(args, kwargs)), with_kwargs=True
    )
    yield block.register_forward_hook(lambda _, __, out: keep("resid_post", out))
    attention = _part(block, parts.attention)
    if attention is not None:  # other blocks of a hybrid model have something in its place
        yield attention.register_forward_hook(lambda _, __, out: keep("attn_out", out))
    ffn = _part(block, parts.ffn)
    assert ffn is not None
    yield ffn.register_forward_hook(lambda _, __, out: keep("mlp_out", out))
    for module in block.modules():
        if parts.output is None and not list(module.children()):
            yield module.register_forward_pre_hook(
                lambda module, args: _through_output(record, module, args)
            )
    if (norm := _part(block, "self_attn.kv_a_layernorm")) is not None:
        yield norm.register_forward_hook(
            lambda _, args, out: (keep("latent", args[0]), keep("normed_latent", out))[0]
        )
    if parts.output is not None and (output := _part(block, parts.output)) is not None:
        yield output.register_forward_pre_hook(
            lambda _, args: _keep(record, "z before W_O", args[0])
        )
    if parts.down is not None:
        yield block.get_submodule(parts.down).register_forward_pre_hook(
            lambda _, args: keep("neurons", args[0])
        )


def _through_output(record: Record, module: nn.Module, args: tuple) -> None:
    """Norms behind the output projection, if `module` is that: what reads the heads' outputs."""
    if not record.get("z") or len(record.get("z_out", [])) == len(record["z"]):
        return
    z, value = record["z"][-1], record["values"][-1]
    if not args or args[0].numel() != z.numel() or not torch.equal(args[0].ravel(), z.ravel()):
        return
    value = repeat(value, "b t k d -> b t (k g) d", g=z.shape[2] // value.shape[2])
    at_zero = module.forward(torch.zeros_like(args[0]))

    def norms(x: Tensor) -> Tensor:
        alone = torch.eye(x.shape[2])  # each head in turn, the others zero
        heads = [module.forward((x * row[:, None]).reshape(args[0].shape)) for row in alone]
        out = [(head - at_zero).reshape(*x.shape[:2], -1).norm(dim=-1) for head in heads]
        return torch.stack(out, dim=-1)

    _keep(record, "z_out", norms(z))
    _keep(record, "value_out", norms(value))


def _part(block: nn.Module, paths: str) -> nn.Module | None:
    """The first module of a block that is there, of paths separated by "|"."""
    names = dict(block.named_modules())
    return next((names[path] for path in paths.split("|") if path in names), None)


def _first(args: tuple, kwargs: dict) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _keep(record: Record, name: str, tensor: Tensor) -> None:
    record.setdefault(name, []).append(tensor.detach().clone())
