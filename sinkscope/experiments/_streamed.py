"""What `streaming_context` finds: the loss of every token of a long text, setting by setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope._bootstrap import bootstrap
from sinkscope._summary import table_as_text
from sinkscope.experiments import _result
from sinkscope.experiments._result import Estimate, Result

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

BLOCK = 128
"""Tokens of a block of the bootstrap: neighbours are alike, so blocks are drawn, not tokens."""
EVERYTHING, NO_SINKS = "everything", "0 sinks"
_COUNTED = {"cache": "positions counted in the cache", "absolute": "positions counted absolutely"}


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class StreamedContext(Result):
    """Loss of every token of a long text, setting by setting.

    Attributes:
        asked: What the figures were made of.
        kept: What is kept in each setting, in words.
        windows: Window of each setting; -1 sees everything.
        counted: How positions were counted in each setting.
        moved_on: The first query that, in every setting, has all kept elements behind it and the
            start outside its window.
        loss: Loss of each query's next token [nat]; nan at the last one, and where a setting has
            not run.
        seconds: What each setting took.
        cache_bytes: Keys and values held between chunks at the end.
        full_bytes: What a cache of the whole text would hold.
    """

    QUESTION = "What are a few kept sinks worth when a long text passes through a window?"

    asked: dict[str, Any]
    kept: list[str]
    windows: list[int]
    counted: list[str]
    moved_on: int
    loss: Float[Tensor, "setting query"]
    seconds: Float[Tensor, "setting"]
    cache_bytes: Float[Tensor, "setting"]
    full_bytes: Float[Tensor, "setting"]

    @property
    def tokens(self) -> int:
        """Length of the text."""
        return self.loss.shape[1]

    @property
    def after(self) -> int:
        """Where "after" begins: at `moved_on`, or half-way if the text hardly gets there."""
        return self.moved_on if self.moved_on + BLOCK <= self.tokens else self.tokens // 2

    def perplexity(self, setting: int, start: int = 0, stop: int | None = None) -> float:
        """Exp of the mean loss of some queries.

        Args:
            setting: Which one.
            start: First query.
            stop: After the last one.
        """
        return float(self._loss(setting, start, stop).mean().exp())

    def interval(self, setting: int, start: int = 0) -> tuple[float, float]:
        """95 % bootstrap interval of the perplexity, over blocks of at least 128 tokens."""
        found = _over_blocks(self._loss(setting, start))
        low, high = torch.tensor([found.low, found.high]).exp().tolist()
        return low, high

    def difference(self, setting: int, other: int, start: int = 0) -> Estimate:
        """Mean loss of a setting less another's [nat], with a 95 % interval.

        Both read the same tokens, so the difference is taken token by token and is far surer than
        either perplexity.

        Args:
            setting: Which one.
            other: What is subtracted.
            start: First query.
        """
        return _over_blocks(self._loss(setting, start) - self._loss(other, start))

    def other(self, setting: int, kept: str) -> int | None:
        """The setting with the same window and counting that keeps something else, if there is one.

        Args:
            setting: Which one.
            kept: What that keeps, in the words of `kept`; "everything" has no window.
        """
        for index, name in enumerate(self.kept):
            same = self._frame_of(index) == self._frame_of(setting)
            if name == kept and (same or kept == EVERYTHING):
                return index
        return None

    def _frame_of(self, setting: int) -> tuple[int, str]:
        return self.windows[setting], self.counted[setting]

    def _loss(self, setting: int, start: int = 0, stop: int | None = None) -> Float[Tensor, "_"]:
        loss = self.loss[setting, start:stop].double()
        return loss[: len(loss) - 1] if stop is None else loss

    def _against(self, setting: int, kept: str) -> Estimate | None:
        other = self.other(setting, kept)
        return None if other in (None, setting) else self.difference(setting, other, self.after)

    def frame(self) -> pd.DataFrame:
        """One row a setting: perplexity of the whole text and after the window has moved on."""
        import pandas as pd

        rows = []
        for setting, kept in enumerate(self.kept):
            low, high = self.interval(setting)
            after_low, after_high = self.interval(setting, self.after)
            rows.append(
                {
                    "kept": kept,
                    "window": self.windows[setting],
                    "positions": self.counted[setting],
                    "tokens": self.tokens,
                    "perplexity": self.perplexity(setting),
                    "perplexity_low": low,
                    "perplexity_high": high,
                    "perplexity_before": self.perplexity(setting, 0, self.after),
                    "perplexity_after": self.perplexity(setting, self.after),
                    "perplexity_after_low": after_low,
                    "perplexity_after_high": after_high,
                    "tokens_per_second": self.tokens / float(self.seconds[setting]),
                    "kv_megabytes": float(self.cache_bytes[setting]) / 1e6,
                    "kv_share": float(self.cache_bytes[setting] / self.full_bytes[setting]),
                }
            )
        return pd.DataFrame(rows)

    def findings(self) -> dict[str, Any]:
        """The table of `frame`, and paired differences of the loss after the window moved on."""
        rows = self.frame().to_dict("records")
        for setting, row in enumerate(rows):
            row["loss_over_everything"] = self._against(setting, EVERYTHING)
            row["loss_over_no_sinks"] = self._against(setting, NO_SINKS)
        return {"tokens": self.tokens, "after": self.after, "settings": rows}

    def summary(self) -> str:
        """The table of perplexities, and in sentences what keeping something spares."""
        rows = self.findings()["settings"]
        full = any(row["loss_over_everything"] for row in rows)
        return "\n".join([self._head(full), self._table(rows, full), *self._spared(rows)])

    def _head(self, full: bool) -> str:
        left = (
            "where every window has left the start behind and what is kept has been read"
            if self.after == self.moved_on
            else "though not every window has left the start behind there"
        )
        over = ", and its loss over that of the model that sees everything [nat]" if full else ""
        return (
            f"{self.tokens:,} tokens, whose keys and values would fill "
            f"{float(self.full_bytes.max()) / 1e6:,.1f} MB. Perplexity from token {self.after:,} "
            f"on, {left}{over}. 95 % intervals over blocks of at least {BLOCK} tokens."
        )

    def _table(self, rows: list[dict[str, Any]], full: bool) -> str:
        table = []
        for row in rows:
            over = row["loss_over_everything"]
            cells = [
                row["kept"],
                "all" if row["window"] < 0 else f"{row['window']:,}",
                row["positions"],
                _result.number(row["perplexity_after"]),
                *([over.signed() if over else ""] if full else []),
                f"{row['kv_megabytes']:,.1f}",
                f"{row['tokens_per_second']:,.0f}",
            ]
            table.append(cells)
        columns = ["kept", "window", "counted", "perplexity", *(["loss over all"] if full else [])]
        return table_as_text([*columns, "KV [MB]", "tokens/s"], table)

    def _spared(self, rows: list[dict[str, Any]]) -> list[str]:
        """What each thing that is kept spares, window by window."""
        sentences: dict[tuple[int, str], list[str]] = {}
        for setting, row in enumerate(rows):
            if row["loss_over_no_sinks"] is not None and row["window"] > 0:
                spared = row["loss_over_no_sinks"].negated()
                sentences.setdefault(self._frame_of(setting), []).append(
                    f"{row['kept']} {spared.to_decimals(3)}"
                )
        return [
            f"Window {window:,}, {_COUNTED[counted]}: beside keeping no sink, what is kept spares "
            f"(nat a token): {'; '.join(told)}."
            for (window, counted), told in sentences.items()
        ]

    def figures(self) -> dict[str, go.Figure]:
        """Perplexity against the window and along the text, for each way of counting positions."""
        from sinkscope.plot import perplexity_along, perplexity_by_window

        rows = self.frame().drop(columns=["perplexity", "perplexity_low", "perplexity_high"])
        rows = rows.rename(columns=lambda name: name.replace("perplexity_after", "perplexity"))
        drawn = {}
        ways = dict.fromkeys(c for c, w in zip(self.counted, self.windows, strict=True) if w > 0)
        for counted in ways:
            about = f"{self.about} · {_COUNTED[counted]}"
            one_of_two = f", {_COUNTED[counted]}" if len(ways) > 1 else ""
            chosen = rows[(rows["positions"] == counted) | (rows["window"] < 0)]
            drawn[f"perplexity-{counted}"] = perplexity_by_window(
                chosen, about=f"{about} · from token {self.after:,} on"
            ).update_layout(title_text=f"Perplexity of a long text through a window{one_of_two}")
            for window in sorted(chosen[chosen["window"] > 0]["window"].unique().tolist()):
                drawn[f"along-{counted}-{window}"] = perplexity_along(
                    self._along(counted, window), about=f"{about} · window {window:,}"
                ).update_layout(
                    title_text=f"Perplexity along a long text, window {window:,}{one_of_two}"
                )
        return drawn

    def _along(self, counted: str, window: int) -> pd.DataFrame:
        """One row a setting and block: its middle, and the block's perplexity."""
        import pandas as pd

        pieces = []
        size = max(BLOCK, self.tokens // 64)
        for setting, kept in enumerate(self.kept):
            if self._frame_of(setting) == (window, counted) or self.windows[setting] < 0:
                blocks = self._loss(setting).split(size)
                pieces.append(
                    pd.DataFrame(
                        {
                            "kept": kept,
                            "position": [size * i + len(b) / 2 for i, b in enumerate(blocks)],
                            "perplexity": [float(b.mean().exp()) for b in blocks],
                        }
                    )
                )
        return pd.concat(pieces, ignore_index=True)


def _over_blocks(x: Float[Tensor, "query"]) -> Estimate:
    """The mean, and its interval over blocks of `BLOCK` tokens or more, as equal as can be.

    Every token is in a block: an interval over whole blocks of `BLOCK` alone would be that of
    another mean. Fewer tokens than two blocks have no interval.
    """
    blocks = [block.mean() for block in x.tensor_split(max(1, len(x) // BLOCK))]
    _, low, high = bootstrap(torch.stack(blocks))
    return Estimate(float(x.mean()), float(low), float(high))
