"""`sinkscope waiver`: what makes a token the sink, and making another one the sink."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli import _common as common
from sinkscope.errors import SinkscopeError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    from sinkscope.experiments.result import Result

QUESTIONS = {
    "nonmixture": "Which FFN dims mark a token that attends only to itself? (Yan et al., Fig. 1)",
    "norms": "Does the first position's vector stand out? (Fig. 2)",
    "mask": "Does a token become the sink when it attends only to itself? (Fig. 3)",
    "positions": "Does another position's vector make a sink? (Fig. 4)",
    "parts": "Which part of what makes the sink is sufficient, and which is necessary?",
}


def waiver(
    context: common.Context,
    model: common.Model,
    ask: Annotated[
        str,
        typer.Option(
            help="Comma-separated: all, or some of nonmixture (Fig. 1), norms (2), mask (3), "
            "positions (4), parts."
        ),
    ] = "all",
    position: Annotated[
        int | None,
        typer.Option(min=1, help="The position to designate; default: 255, or two thirds along."),
    ] = None,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 8,
    length: common.Length = 320,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Measure what makes a token the sink, and make another one the sink (Yan et al. 2407.01601).

    With --out, writes QUESTION.json, QUESTION.csv and QUESTION.html (all figures) for each one. A
    folder is for one model and one choice of texts.
    """
    folder = common.writable_folder(out)
    wanted = questions(ask)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss

        loaded = ss.load_model(model, device=device, dtype=dtype)
        void = ("prompts", "length", "bos")  # the seed also draws what is put in
        source = common.prompts_of(
            context, texts, void, prompts=prompts, length=length, bos=bos, seed=seed
        )
        if ask != "all":
            _refuse_before_the_work(wanted, loaded)
        if folder is not None:
            _claim(folder, loaded, source, position=position, seed=seed)
        answers = _answers(loaded, source, position, seed)
        results: dict[str, Result] = {}
        refused: dict[str, str] = {}
        written: list[Path] = []
        for question in wanted:
            try:
                results[question] = answers[question]()
            except UnsupportedError as error:
                if ask != "all":
                    raise
                refused[question] = str(error)
            else:
                written += [] if folder is None else results[question].save(folder / question)
    if json:
        answered = {name: one.to_dict() for name, one in results.items()}
        common.print_json({**answered, "refused": refused})
        return
    for name, one in results.items():
        typer.echo(QUESTIONS[name])
        common.show(one)
        typer.echo()
    for name, reason in refused.items():
        typer.echo(f"{QUESTIONS[name]}\n{reason}\n")
    for file in written:
        typer.echo(f"wrote {file}")


def questions(ask: str) -> tuple[str, ...]:
    """Parse the --ask option.

    Raises:
        SinkscopeError: If it has an unknown question.
    """
    if ask == "all":
        return tuple(QUESTIONS)
    wanted = common.some("--ask", ask)
    for question in wanted:
        if question not in QUESTIONS:
            raise SinkscopeError(
                f"--ask {question} is not a question; choose all, or some of "
                f"{', '.join(QUESTIONS)}."
            )
    return wanted


def _refuse_before_the_work(wanted: tuple[str, ...], model: Any) -> None:
    """Refuse a question that does not apply to the model before the others are measured.

    Raises:
        UnsupportedError: If there is one.
    """
    from sinkscope.experiments import waiver as experiment
    from sinkscope.models.capabilities import capabilities

    if "norms" in wanted:
        experiment.position_norms(model)  # takes no time
    caps = capabilities(model)
    if "positions" in wanted:
        experiment.check_positions(caps)
    if "nonmixture" in wanted or "parts" in wanted:
        caps.hook("mlp_out", 0)


def _claim(folder: Path, model: Any, source: Any, **options: Any) -> None:
    """Record the request in the folder; refuse a folder with results of another request.

    Raises:
        ReportError: If there are any.
    """
    from sinkscope.experiments.resume import claim, request_of
    from sinkscope.prompts.texts import as_texts

    request = request_of(model, as_texts(source).tokenize(model).right_padded(), **options)
    claim(folder / "waiver.request.json", [folder / f"{name}.json" for name in QUESTIONS], request)


def _answers(
    model: Any, source: Any, position: int | None, seed: int
) -> dict[str, Callable[[], Result]]:
    """Return the experiment for each question."""
    from sinkscope.experiments import waiver as experiment

    bar = common.progress_wanted()
    shared: dict[str, Any] = dict(position=position, seed=seed, progress=bar)
    return {
        "nonmixture": lambda: experiment.nonmixture(model, source, progress=bar),
        "norms": lambda: experiment.position_norms(model),
        "mask": lambda: experiment.structured_mask(model, source, **shared),
        "positions": lambda: experiment.position_embeddings(model, source, **shared),
        "parts": lambda: experiment.which_part(model, source, **shared),
    }
