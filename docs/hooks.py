"""What MkDocs is to do beyond Markdown, while it builds the documentation.

A line ``::: all sinkscope.plot`` becomes one entry for each public name of that package, as its
stub lists them; for a package without a stub, one for each public module. ``::: fields`` becomes
the table of a report's fields, and ``::: commands`` the help of every command. Formulas become
MathML, which browsers draw without a script. Lessons that ``make notebooks-html`` has drawn become
pages of the site.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
LESSONS = ROOT / "out" / "notebooks"

_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Files, config: Any) -> Files:
    """Add the lessons, as far as they have been drawn."""
    for page in sorted(LESSONS.glob("*.html")):
        files.append(
            File.generated(config, f"lessons/{page.name}", abs_src_path=str(page.resolve()))
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write out the lines that stand for generated text."""
    markdown = re.sub(r"^::: all (\S+)$", _entries, markdown, flags=re.MULTILINE)
    if "\n::: fields\n" in markdown:
        markdown = markdown.replace("\n::: fields\n", f"\n{fields()}\n")
    if "\n::: commands\n" in markdown:
        markdown = markdown.replace("\n::: commands\n", f"\n{commands()}\n")
    return re.sub(r"\[([^]]+)\]\(\.\./notebooks/(\w+)\.ipynb\)", _lesson, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas as MathML; tables that the keyboard can reach, since wide ones scroll."""
    content = content.replace("<table>", '<table tabindex="0">')
    return _FORMULA.sub(
        lambda found: convert(
            html.unescape(found[3]), display="block" if found[2] == "[" else "inline"
        ),
        content,
    )


def public_names(package: str) -> list[str]:
    """The full names of what a package offers, in the order of its stub, or else its modules."""
    folder = ROOT.joinpath(*package.split("."))
    stub = folder / "__init__.pyi"
    if not stub.exists():
        modules = sorted(file.stem for file in folder.glob("[!_]*.py"))
        return [f"{package}.{module}" for module in modules]
    statements = ast.parse(stub.read_text(encoding="utf-8")).body
    imports = [one for one in statements if isinstance(one, ast.ImportFrom)]
    return [f"{package}.{name.asname or name.name}" for one in imports for name in one.names]


def _entries(found: re.Match[str]) -> str:
    """One mkdocstrings entry for each name; the packages in `sinkscope` have pages of their own."""
    names = [name for name in public_names(found[1]) if not _is_package(name)]
    return "\n\n".join(f"::: {name}" for name in names)


def _is_package(name: str) -> bool:
    return ROOT.joinpath(*name.split("."), "__init__.py").exists()


def fields() -> str:
    """The fields of a report as a table, from their declarations."""
    from sinkscope.report.fields import SinkFields

    metrics = SinkFields.metrics()
    rows = [
        f"| `{name}` | {' '.join(one.dims)} | {one.unit or ''} | {_cell(one.about)} "
        f"| {metrics.get(name) or ''} |"
        for name, one in SinkFields.variables().items()
    ]
    return "\n".join(
        ["| field | dimensions | unit | what it is | metric |", "|---|---|---|---|---|", *rows]
    )


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "&#124;")


def commands() -> str:
    """The help of every command, as typer keeps it."""
    import typer

    from sinkscope.cli import app

    return "\n".join(_command(["sinkscope"], typer.main.get_command(app)))


def _command(path: list[str], command: Any) -> list[str]:
    if hasattr(command, "commands"):
        lines = [] if len(path) == 1 else [f"## {' '.join(path)}", "", command.help or "", ""]
        for name, child in command.commands.items():
            lines += _command([*path, name], child)
        return lines
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    usage = " ".join([*path, "[OPTIONS]", *(one.name.upper() for one in arguments)])
    lines = [f"{'#' * len(path)} {' '.join(path)}", "", command.help or "", ""]
    lines += ["```text", usage, "```", "", command.epilog or "", ""]
    lines += ["| option | default | what it is |", "|---|---|---|"]
    for one in command.params:
        name = one.name.upper() if one in arguments else ", ".join(one.opts)
        default = "" if one.default is None or one.default is False else f"`{one.default}`"
        lines.append(f"| `{name}` | {default} | {_cell(getattr(one, 'help', '') or '')} |")
    return [*lines, ""]


def _lesson(found: re.Match[str]) -> str:
    """A lesson's drawn page, if there is one, and else where its notebook lies."""
    title, name = found.groups()
    if (LESSONS / f"{name}.html").exists():
        return f"[{title}](lessons/{name}.html) (`notebooks/{name}.ipynb`)"
    return f"{title} (`notebooks/{name}.ipynb`)"
