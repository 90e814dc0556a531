"""The task is what it says: generated as the rule demands, solved exactly."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from sinkscope.bb import Batches, BigramBackcopy, BigramSource
from sinkscope.bb.source import count_bigrams, python_prose
from sinkscope.errors import TextError

MARGINAL = [0.4, 0.3, 0.2, 0.1]
TRANSITION = [
    [0.1, 0.2, 0.3, 0.4],
    [0.7, 0.1, 0.1, 0.1],
    [0.0, 0.5, 0.5, 0.0],
    [0.25, 0.25, 0.0, 0.5],
]


@pytest.fixture
def source() -> BigramSource:
    return BigramSource(torch.tensor(MARGINAL), torch.tensor(TRANSITION), tuple("abcd"))


def start_row(triggers: tuple[int, ...]) -> list[float]:
    kept = [0.0 if i in triggers else p for i, p in enumerate(MARGINAL)]
    return [p / sum(kept) for p in kept]


def every_sequence(triggers: tuple[int, ...], symbols: int):
    """All sequences of symbols after BOS with their probability, by plain recursion."""

    def grow(sequence: tuple[int, ...], probability: float):
        if len(sequence) == symbols:
            yield sequence, probability
            return
        if not sequence:
            row = start_row(triggers)
        elif sequence[-1] in triggers:
            row = [float(i == sequence[-2]) for i in range(4)]
        else:
            row = TRANSITION[sequence[-1]]
        for symbol, p in enumerate(row):
            if p > 0:
                yield from grow((*sequence, symbol), probability * p)

    yield from grow((), 1.0)


def entropy(row: list[float]) -> float:
    return -sum(p * math.log(p) for p in row if p > 0)


@pytest.mark.parametrize(("bos", "triggers"), [(1, (0,)), (1, (0, 1)), (0, (0,)), (2, (0, 2))])
def test_statistics_equal_a_sum_over_all_sequences(source, bos, triggers):
    length = 6
    task = BigramBackcopy(source, triggers, bos)
    solved = task.statistics(length)
    occurrence = torch.zeros(length, 4, dtype=torch.float64)
    loss = trigger = idle = idle_entropy = 0.0
    for sequence, p in every_sequence(triggers, length - bos):
        for position, symbol in enumerate(sequence, start=bos):
            occurrence[position, symbol] += p
            if symbol in triggers:
                trigger += p
            else:
                idle += p
                idle_entropy += p * entropy(TRANSITION[symbol])
                loss += p * entropy(TRANSITION[symbol])
    loss += entropy(start_row(triggers)) if bos else 0.0
    torch.testing.assert_close(solved.symbol_probability, occurrence)
    assert solved.trigger_share == pytest.approx(trigger / length)
    assert solved.bigram_entropy == pytest.approx(idle_entropy / idle)
    assert solved.bayes_loss == pytest.approx(loss / length)


@pytest.mark.parametrize("bos", [0, 1, 2])
def test_samples_follow_the_rule(source, bos):
    task = BigramBackcopy(source, triggers=(0, 1), bos=bos)
    tokens = task.sample(2000, 20, seed=3)
    assert tokens.shape == (2000, 20)
    assert (tokens[:, :bos] == task.bos_id).all()
    assert (tokens[:, bos:] < 4).all()
    start, following = Counter(), {symbol: Counter() for symbol in range(4)}
    for row in tokens.tolist():
        start[row[bos]] += 1
        for t in range(bos, 19):
            if row[t] in (0, 1):
                assert row[t + 1] == row[t - 1]
            else:
                following[row[t]][row[t + 1]] += 1
    check_frequencies(start, start_row((0, 1)))
    for symbol in (2, 3):
        check_frequencies(following[symbol], TRANSITION[symbol])


def check_frequencies(counts: Counter, row: list[float]) -> None:
    """Each count lies within five binomial standard deviations of its expectation."""
    total = sum(counts.values())
    assert total > 1000
    for symbol, p in enumerate(row):
        spread = math.sqrt(total * p * (1 - p))
        assert abs(counts[symbol] - total * p) <= 5 * spread + 1e-9, (
            symbol,
            counts[symbol] / total,
        )


def test_symbol_frequencies_match_the_chain_at_every_position():
    task = BigramBackcopy(BigramSource.synthetic(8, seed=1), triggers=2)
    prompts, length = 20_000, 12
    seen = torch.nn.functional.one_hot(task.sample(prompts, length, seed=0), task.vocab).sum(0)
    expected = task.statistics(length).symbol_probability
    frequency = seen[:, :8].double() / prompts
    spread = (expected * (1 - expected) / prompts).sqrt()
    assert ((frequency - expected).abs() <= 5 * spread + 1e-12).all()


def test_bayes_loss_is_what_the_oracle_pays(source):
    task = BigramBackcopy(source, triggers=1)
    tokens = task.sample(20_000, 13, seed=5)
    truth = task.oracle(tokens)
    paid = -truth[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1).log()
    standard_error = paid.mean(1).std() / math.sqrt(len(tokens))
    assert abs(paid.mean() - task.statistics(12).bayes_loss) < 5 * standard_error
    assert standard_error < 0.01


def test_oracle_by_hand(source):
    task = BigramBackcopy(source, triggers=(0,))
    truth = task.oracle(torch.tensor([[4, 2, 1, 0]]))  # BOS c b a
    expected = [start_row((0,)), TRANSITION[2], TRANSITION[1], [0.0, 1.0, 0.0, 0.0]]
    torch.testing.assert_close(
        truth[0], torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0
    )


def test_impossible_symbols_never_occur(source):
    task = BigramBackcopy(source, triggers=(0,))
    tokens = task.sample(5000, 30, seed=1)
    after_c = tokens[:, 1:][tokens[:, :-1] == 2]
    assert len(after_c) > 1000
    assert not (after_c == 3).any()  # P(d | c) = 0


def test_batches_are_random_access_and_seeded(source):
    task = BigramBackcopy(source)
    whole = Batches(task, batch=4, length=10, seed=1)
    in_order = [whole[step].clone() for step in range(600)]
    again = Batches(task, batch=4, length=10, seed=1)
    for step in (599, 3, 256, 255, 0):  # across the chunk's borders, backwards
        assert torch.equal(again[step], in_order[step])
    assert len({tuple(b.flatten().tolist()) for b in in_order}) == 600
    other = Batches(task, batch=4, length=10, seed=2)
    assert not any(torch.equal(other[step], in_order[step]) for step in range(10))


def test_text_is_counted_like_a_loop_would():
    text = "abracadabra!"
    kept, counts = count_bigrams(text, symbols=4)
    filtered = [c for c in text if c in kept]
    assert kept[0] == "a"
    for i, before in enumerate(kept):
        for j, after in enumerate(kept):
            places = range(len(filtered) - 1)
            expected = sum(filtered[t : t + 2] == [before, after] for t in places)
            assert counts[i, j] == expected


def test_a_symbol_that_nothing_follows_gets_the_marginal():
    source = BigramSource.from_counts(torch.tensor([[1, 3], [0, 0]]))
    torch.testing.assert_close(source.transition[1], source.marginal)
    torch.testing.assert_close(source.transition[0], torch.tensor([0.25, 0.75]).double())


def test_shipped_english_is_the_prose_of_pythons_own_help():
    shipped = BigramSource.english()
    assert len(shipped) == 65
    assert [shipped.symbols[t] for t in BigramBackcopy().triggers] == [" ", "e", "t"]
    kept, counts = count_bigrams(python_prose(), 65)
    ours = BigramSource.from_counts(counts, kept)
    place = {symbol: i for i, symbol in enumerate(kept)}
    apart = sum(
        abs(p - (ours.marginal[place[symbol]].item() if symbol in place else 0.0))
        for symbol, p in zip(shipped.symbols, shipped.marginal.tolist(), strict=True)
    )
    assert apart < 0.1  # the help texts change a little from one Python to the next


def test_default_task_in_numbers():
    solved = BigramBackcopy().statistics(256)
    assert solved.bayes_loss == pytest.approx(1.436, abs=5e-4)
    assert solved.trigger_share == pytest.approx(0.310, abs=5e-4)
    assert solved.bigram_entropy == pytest.approx(2.074, abs=5e-4)


@pytest.mark.parametrize(
    ("marginal", "transition", "message"),
    [
        ([0.5, 0.4], [[1.0, 0.0], [0.0, 1.0]], "marginal must be non-negative and sum to 1"),
        ([0.5, 0.5], [[1.0, 0.0], [0.5, 0.6]], "transition must be non-negative and sum to 1"),
        ([0.5, 0.5], [[1.5, -0.5], [0.5, 0.5]], "transition must be non-negative and sum to 1"),
    ],
)
def test_tables_that_are_no_probabilities_are_refused(marginal, transition, message):
    with pytest.raises(TextError, match=message):
        BigramSource(torch.tensor(marginal), torch.tensor(transition))


def test_impossible_tasks_are_refused(source):
    with pytest.raises(TextError, match="symbol ids below 4"):
        BigramBackcopy(source, triggers=(4,))
    with pytest.raises(TextError, match="every symbol is a trigger"):
        BigramBackcopy(source, triggers=4)
    with pytest.raises(TextError, match="BOS tokens must be 0 or more"):
        BigramBackcopy(source, bos=-1)
    with pytest.raises(TextError, match="two distinct characters"):
        BigramSource.from_text("aaaa")
    for prompts, length in ((2, 0), (0, 5), (-1, 5)):
        with pytest.raises(TextError, match=f"{prompts} prompts of {length} tokens"):
            BigramBackcopy(source).sample(prompts, length)
