"""`Dormancy` in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.experiments._result import listed, number

if TYPE_CHECKING:
    from sinkscope.experiments._dormancy import Dormancy

_NAMED = 6


def summary(found: Dormancy) -> str:
    """What sleeps where, whether the loss agrees, and what predicts it."""
    facts = found.findings()
    counts = [f"{n} of {facts['heads']} on {domain}" for domain, n in facts["dormant"].items()]
    lines = [
        f"Dormant heads (sink attention above {found.parked:g}): {listed(counts)}.",
        *(_pair(found, pair, n) for pair, n in facts["significant"].items()),
        _differing(found, facts["differing"]),
    ]
    for mode, rows in facts["prediction"].items():
        if facts["differing"]:
            lines.append(_judged(facts["differing"], mode))
        lines.append(_prediction(mode, rows))
    return "\n".join(line for line in lines if line)


def _pair(found: Dormancy, pair: str, n: int) -> str:
    return (
        f"{pair}: sink attention differs in {n} heads (max-t permutation test over prompts, "
        f"{found.level:.0%} at most to name even one wrongly)."
    )


def _differing(found: Dormancy, heads: list[dict[str, Any]]) -> str:
    what = f"dormant on one and active on another (lower by {found.drop:g} or more)"
    if not heads:
        return f"No head is {what}."
    some = []
    for head in heads[:_NAMED]:
        here, there = (f"{attention.mean:.2f}" for attention in head["sink_attention"])
        kinds = f"{head['dormant_on']} {here}, {head['active_on']} {there}"
        some.append(f"{head['layer']}.{head['head']} ({kinds})")
    more = f", and {len(heads) - _NAMED} more" if len(heads) > _NAMED else ""
    return f"{len(heads)} {'is' if len(heads) == 1 else 'are'} {what}: {', '.join(some)}{more}."


def _judged(heads: list[dict[str, Any]], mode: str) -> str:
    confirmed = [head for head in heads if head[mode]["confirmed"]]
    text = (
        f"Removal ({mode}) confirms {len(confirmed)} of {len(heads)}: it costs significantly more "
        "where the head is active."
    )
    if confirmed:
        strongest = sorted(
            confirmed, key=lambda head: head[mode]["cost"][0].mean - head[mode]["cost"][1].mean
        )
        some = [
            f"{head['layer']}.{head['head']} ({head['dormant_on']} "
            f"{head[mode]['cost'][0]}, {head['active_on']} {head[mode]['cost'][1]} nat)"
            for head in strongest[:_NAMED]
        ]
        text += f" Strongest: {listed(some)}."
    return text


def _prediction(mode: str, rows: list[dict[str, Any]]) -> str:
    """How well sink attention ranks heads by cost, and which score does it best."""
    sentences = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        own = [row for row in rows if row["domain"] == domain]
        sink = next(row for row in own if row["score"] == "sink_attention")
        best = max(own, key=lambda row: row["rho"] * row["expected"])
        sentences.append(
            f"on {domain} sink attention ρ = {_interval(sink)}, best {best['score']} "
            f"ρ = {_interval(best)}"
        )
    return f"Rank correlation with what removal ({mode}) costs: {'; '.join(sentences)}."


def _interval(row: dict[str, Any]) -> str:
    return f"{number(row['rho'])} [{number(row['low'])}, {number(row['high'])}]"
