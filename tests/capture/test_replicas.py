"""A scan divided between replicas gives the figures of a scan on one device."""

from __future__ import annotations

import threading

import pytest
import torch
from tqdm.auto import tqdm

import sinkscope as ss
from sinkscope.capture import paths, runner
from sinkscope.capture.observers import massive
from sinkscope.capture.replicas import Batches, InOrder, Share, Stopped, side_by_side
from sinkscope.errors import ModelError, SinkscopeError, UnsupportedError
from sinkscope.models.replicas import check_devices, further_devices
from tests.families.architectures import BY_NAME

TWO = ["cpu", "cpu"]
LENGTHS = (24, 9, 17, 24, 5, 12, 20)


@pytest.fixture
def model():
    return ss.load_model(BY_NAME["llama"].build())


@pytest.fixture
def ragged():
    return _ragged("llama")


def _ragged(name: str):
    rows = BY_NAME[name].tokens(prompts=len(LENGTHS)).tolist()
    return ss.token_ids([row[:length] for row, length in zip(rows, LENGTHS, strict=True)])


def _down(model, layer: int) -> torch.Tensor:
    """The weight of a layer's last projection."""
    (name,) = (n for n in model.original_model.state_dict() if f"{layer}.mlp" in n and "down" in n)
    return model.original_model.state_dict()[name]


def by_turns(monkeypatch, model, slow: bool) -> list[str]:
    """Make one of the two models wait until the other has run a batch; who ran, in order."""
    real, ran = runner.forward, []
    other_ran = threading.Event()

    def forward(which, batch):
        own = which is model
        if own == slow:
            assert other_ran.wait(20), "the other replica never ran"
        real(which, batch)
        ran.append("model" if own else "replica")
        if own != slow:
            other_ran.set()

    monkeypatch.setattr(runner, "forward", forward)
    return ran


@pytest.mark.parametrize(
    ("name", "attention", "slow"),
    [("llama", "streaming", True), ("gpt2", "eager", False), ("bert", "streaming", False)],
)
def test_figures_are_those_of_one_device_bit_for_bit(
    name: str, attention: str, slow: bool, monkeypatch
) -> None:
    """Whichever replica is faster: batches are folded in the order of the text."""
    model, texts = ss.load_model(BY_NAME[name].build()), _ragged(name)
    ask = dict(metrics=["all", "ffn_dims"], attention=attention, batch=2, progress=False)
    alone = ss.scan(model, texts, **ask)
    ran = by_turns(monkeypatch, model, slow)
    shared = ss.scan(model, texts, devices=TWO, **ask)
    assert set(ran) == {"model", "replica"} and len(ran) == 4
    assert shared.equals(alone)
    for field in ("sink_attention", "residual_peak"):
        assert all(map(torch.equal, shared.interval(field), alone.interval(field)))


def test_auto_batches_give_each_replica_its_share(model, ragged, monkeypatch) -> None:
    """Other batches than on one device; every figure agrees to rounding."""
    real, tokens = runner.forward, []

    def forward(which, batch):
        tokens.append(batch.mask.numel())
        real(which, batch)

    alone = ss.scan(model, ragged, progress=False)
    monkeypatch.setattr(runner, "forward", forward)
    shared = ss.scan(model, ragged, devices=TWO, progress=False)
    assert len(tokens) > 1 and max(tokens) <= -(-sum(LENGTHS) // 2)
    assert shared.measured() == alone.measured()
    for field in alone.measured():
        torch.testing.assert_close(
            shared[field], alone[field], rtol=1e-4, atol=1e-5, equal_nan=True
        )


def test_sinks_that_are_found_and_nulls(monkeypatch) -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    tokens = ss.token_ids(BY_NAME["llama"].tokens(prompts=3, length=40, seed=2))
    ask = dict(metrics=["sink_attention", "residual"], batch=1, progress=False)
    for more in (dict(sinks="auto", epsilon=0.04), dict(nulls=2)):
        alone = ss.scan(model, tokens, **ask, **more)
        assert ss.scan(model, tokens, devices=TWO, **ask, **more).equals(alone)


def test_norms_through_the_output_are_of_the_replica(model, ragged) -> None:
    """Its Gram matrices lie where it does."""
    ask = dict(metrics="through_output", batch=1, progress=False)
    shared = ss.scan(model, ragged, devices=["cpu"] * 3, **ask)
    assert shared.equals(ss.scan(model, ragged, **ask))


def test_massive_activations_looked_at_late_by_two(model, ragged, monkeypatch) -> None:
    """As on a GPU; here a weight makes them, since hooks are refused."""
    _down(model, 0)[3] *= 1e6
    monkeypatch.setattr(massive, "_late", lambda x: 3)
    monkeypatch.setattr(massive, "UNREAD", 1)
    ask = dict(metrics=["massive"], batch=1, progress=False)
    alone = ss.scan(model, ragged, **ask).massive
    shared = ss.scan(model, ragged, devices=TWO, **ask).massive
    assert len(alone.value) > 10
    for field in ("prompt", "layer", "position", "dim", "value", "ratio", "count"):
        assert torch.equal(getattr(shared, field), getattr(alone, field)), field


def test_a_model_by_name_is_loaded_on_the_first_device(tmp_path, ragged) -> None:
    BY_NAME["llama"].build().save_pretrained(tmp_path)
    ask = dict(metrics="core", batch=2, progress=False)
    assert ss.scan(str(tmp_path), ragged, devices=TWO, **ask).settings.device == "cpu"


def test_a_replica_that_runs_out_of_memory_halves_the_batch(model, ragged, monkeypatch) -> None:
    alone = ss.scan(model, ragged, metrics="core", progress=False)
    real = runner.forward

    def short_of_memory(which, batch):
        real(which, batch)
        if which is not model and len(batch.rows) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    monkeypatch.setattr(runner, "forward", short_of_memory)
    shared = ss.scan(model, ragged, metrics="core", batch=3, devices=TWO, progress=False)
    for field in alone.measured():
        torch.testing.assert_close(
            shared[field], alone[field], rtol=1e-4, atol=1e-5, equal_nan=True
        )


@pytest.mark.parametrize("fails", ["model", "replica"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_one_stops_the_others(model, ragged, fails, error, monkeypatch) -> None:
    """Ctrl-C reaches the main thread, in which the model itself runs, whatever it does then."""
    hooks = {name: len(point._forward_hooks) for name, point in model.hook_dict.items()}
    real, ran = runner.forward, []
    begun = threading.Event()

    def forward(which, batch):
        if (which is model) == (fails == "model"):
            assert begun.wait(20)
            raise error("one sentence")
        begun.set()
        ran.append(1)
        real(which, batch)

    monkeypatch.setattr(runner, "forward", forward)
    threads = threading.active_count()
    with pytest.raises(error, match="one sentence"):
        ss.scan(model, ragged, batch=1, devices=TWO, progress=False)
    assert threading.active_count() == threads
    assert {name: len(point._forward_hooks) for name, point in model.hook_dict.items()} == hooks
    monkeypatch.setattr(runner, "forward", real)
    ss.scan(model, ragged, metrics="core", progress=False)


def test_a_replica_in_the_middle_of_a_pass_stops_at_its_next_layer(model, ragged) -> None:
    stop = threading.Event()
    listener = runner._Listener([], stop)
    stop.set()
    with pytest.raises(Stopped):
        listener.emit("value", 0, torch.zeros(1))


def test_nan_in_the_last_batch_of_a_replica_is_an_error(model, ragged, monkeypatch) -> None:
    """No batch comes after it, in which it would be seen."""
    by_turns(monkeypatch, model, slow=True)
    forward = runner.forward

    def broken(which, batch):
        if which is not model:
            _down(which, 1).fill_(torch.nan)
        forward(which, batch)

    monkeypatch.setattr(runner, "forward", broken)
    with pytest.raises(ModelError, match="after layer 1 contains nan"):
        ss.scan(model, ragged, metrics=["residual"], batch=4, devices=TWO, progress=False)


def test_one_bar_counts_every_prompt_once(model, ragged, monkeypatch) -> None:
    bars = []

    class Bar(tqdm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

    monkeypatch.setattr(runner, "tqdm", Bar)
    ss.scan(model, ragged, metrics="core", batch=1, devices=TWO)
    assert [(bar.n, bar.total) for bar in bars] == [(7, 7)]


def test_hooks_and_interventions_are_refused(model, ragged) -> None:
    with (
        ss.ZeroValue(model, 0),
        pytest.raises(UnsupportedError, match=r"ZeroValue\(.*without devices under them"),
    ):
        ss.scan(model, ragged, devices=TWO, progress=False)
    with (
        model.hooks(fwd_hooks=[("blocks.0.hook_resid_post", lambda x, hook: x)]),
        pytest.raises(UnsupportedError, match=r"put on \(blocks.0.hook_out\)"),
    ):
        ss.scan(model, ragged, devices=TWO, progress=False)
    handle = model.original_model.model.norm.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"norm \(torch\)"):
        ss.scan(model, ragged, devices=TWO, progress=False)
    handle.remove()
    with ss.ZeroValue(model, 0):  # one device needs no copy
        ss.scan(model, ragged, metrics="core", devices=["cpu"], progress=False)


@pytest.mark.parametrize(
    ("devices", "kind", "message"),
    [
        ("cuda:0", SinkscopeError, r"expected a list of devices such as \["),
        ([], SinkscopeError, r"devices is \[\]; expected a list"),
        ([0, 1], SinkscopeError, "expected a list"),
        (["cpu", "nowhere"], ModelError, "There is no device 'nowhere' here"),
        (["cpu", "cpu:1"], ModelError, "There is no device 'cpu:1' here"),
    ],
)
def test_what_is_no_list_of_devices(devices, kind, message) -> None:
    with pytest.raises(kind, match=message):
        check_devices(devices)


def test_a_model_that_lies_elsewhere(model) -> None:
    elsewhere = [torch.device("cuda", 0), torch.device("cuda", 1)]
    with pytest.raises(ModelError, match="lies on cpu, which is not among the devices cuda:0, cud"):
        further_devices(model, elsewhere)
    assert further_devices(model, [*elsewhere, torch.device("cpu")]) == elsewhere


# -- who runs what, and in which order it is folded ------------------------------------------------


def test_batches_are_handed_out_once_each_and_put_back() -> None:
    order, classes = torch.tensor([4, 2, 0, 1, 3]), torch.tensor([1, 0, 0, 0, 0])
    left = Batches(order, classes, lambda prompt: 2)
    shares = [left.next(), left.next()]
    assert [share.rows.tolist() for share in shares] == [[4, 2], [0]], "classes run apart"
    left.put_back(shares[0], most=1)
    taken = []
    while (share := left.next()) is not None:
        taken.append((share.start, share.rows.tolist()))
    assert taken == [(0, [4]), (1, [2]), (3, [1]), (4, [3])]


def test_folding_waits_for_what_comes_before() -> None:
    folded: list[int] = []
    in_order = InOrder(folded.append)
    shares = {start: Share(start, torch.arange(n)) for start, n in ((0, 2), (2, 1), (3, 4))}
    in_order.add(shares[3], 3)
    in_order.add(shares[2], 2)
    assert folded == []
    in_order.add(shares[0], 0)
    assert folded == [0, 2, 3]


def test_the_first_error_is_the_one_that_is_raised() -> None:
    stop, done = threading.Event(), []

    def waits():
        assert stop.wait(20)
        done.append(1)
        raise Stopped

    def fails():
        raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        side_by_side([waits, waits, fails], stop)
    assert len(done) == 2


def test_a_share_is_a_share_of_tokens_not_of_prompts() -> None:
    """Long prompts come first: by count, the first batch would have most of the work."""
    model = ss.load_model(BY_NAME["llama"].build())
    lengths = [64, 64, 8, 8, 8, 8, 8, 8]
    texts = ss.token_ids([list(range(3, 3 + length)) for length in lengths])
    texts = texts.tokenize(model).right_padded()
    team = runner.Replica(model, paths.choose(model, ss.capabilities(model), "auto"), [])
    size = runner._sizes("auto", [team, team], texts)
    assert [size(prompt) for prompt in (0, 2)] == [1, 11]
