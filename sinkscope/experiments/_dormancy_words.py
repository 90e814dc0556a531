"""`Dormancy` in words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinkscope.experiments._result import counted, listed, number

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
    for mode, tables in facts["prediction"].items():
        if facts["differing"]:
            lines.append(_judged(facts["differing"], mode, facts["typical_effect"][mode]))
        lines += [_prediction(mode, of, rows) for of, rows in tables.items()]
    return "\n".join(line for line in lines if line)


def _pair(found: Dormancy, pair: str, n: int) -> str:
    return (
        f"{pair}: sink attention differs in {counted(n, 'head')} (max-t permutation test over "
        f"prompts, {found.level:.0%} at most to name even one wrongly)."
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


def _judged(heads: list[dict[str, Any]], mode: str, typical: dict[str, float]) -> str:
    confirmed = [head for head in heads if head[mode]["confirmed"]]
    usual = ", ".join(f"{domain} {number(effect)}" for domain, effect in typical.items())
    text = (
        f"Removal ({mode}) confirms {len(confirmed)} of {len(heads)}: it moves a prompt's loss "
        f"more where the head is active, measured by the median head ({usual} nat)."
    )
    if not confirmed:
        return text

    def ratio(head: dict[str, Any]) -> float:
        asleep, awake = head[mode]["effect"]
        return awake.mean / asleep.mean

    some = []
    for head in sorted(confirmed, key=ratio, reverse=True)[:_NAMED]:
        asleep, awake = (number(effect.mean) for effect in head[mode]["effect"])
        kinds = f"{head['dormant_on']} {asleep}, {head['active_on']} {awake} nat"
        some.append(f"{head['layer']}.{head['head']} ({kinds})")
    return f"{text} Most: {listed(some)}."


_OF = {"cost": "what removal ({}) costs", "effect": "how far removal ({}) moves the loss"}


def _prediction(mode: str, of: str, rows: list[dict[str, Any]]) -> str:
    """How well sink attention ranks heads, and which score does it best."""
    sentences = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        own = [row for row in rows if row["domain"] == domain]
        sink = next(row for row in own if row["score"] == "sink_attention")
        best = max(own, key=lambda row: row["rho"] * row["expected"])
        sentence = f"on {domain} sink attention ρ = {_interval(sink)}"
        if best is not sink:
            sentence += f", best {best['score']} ρ = {_interval(best)}"
        sentences.append(sentence)
    return f"Rank correlation with {_OF[of].format(mode)}: {'; '.join(sentences)}."


def _interval(row: dict[str, Any]) -> str:
    return f"{number(row['rho'])} [{number(row['low'])}, {number(row['high'])}]"
