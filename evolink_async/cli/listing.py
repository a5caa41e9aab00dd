"""`models`: the catalogue for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from evolink_async.catalog import Model, all_models, get_model, nearest
from evolink_async.cli.outputs import Standard
from evolink_async.cli.text import clean
from evolink_async.cli.view import to_terminal
from evolink_async.errors import InvalidRequestError

if TYPE_CHECKING:
    from evolink_async.catalog import ParamSpec
    from evolink_async.cli.view import Screen

VALUES_SHOWN = 200  # characters of allowed values before they are cut


def show_models(kind: str | None, *, legacy: bool) -> int:
    """A table on a terminal, lines of tab-separated cells elsewhere."""
    chosen = [model for model in all_models() if kind in (None, model.kind) and (legacy or not model.legacy)]
    if not to_terminal():
        standard = Standard()
        for model in chosen:
            standard.line("\t".join(_cells(model)))
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for name in ("model", "kind", "billed", "takes", ""):
        table.add_column(name, overflow="fold")
    for model in chosen:
        cells = _cells(model)
        table.add_row(*(Text(cell, style="dim" if model.legacy else "") for cell in cells))
    console = _console()
    console.print(table)
    console.print(Text(f"{len(chosen)} models; what one takes: evolink-async models ID", style="dim"))
    return 0


def _cells(model: Model) -> list[str]:
    billed = (model.billing_rule or "").replace("_", " ")
    takes = "" if model.estimated_time is None else f"about {model.estimated_time} s"
    return [model.id, model.kind, billed, takes, "legacy" if model.legacy else ""]


def show_model(screen: Screen, name: str) -> int:
    """What a model takes. Raises `InvalidRequestError` for one that isn't known."""
    model = get_model(name)
    if model is None:
        near = " or ".join(nearest(name))
        hint = f"did you mean {near}?" if near else "`evolink-async models` lists them"
        raise InvalidRequestError(f"no model {clean(name)!r} in the catalogue; {hint}", param="model")
    facts = [model.kind, (model.billing_rule or "").replace("_", " ")]
    facts.append("" if model.estimated_time is None else f"about {model.estimated_time} s")
    facts.append("in older documents only" if model.legacy else "")
    facts.append("" if model.documented else "no page found, so the parameters are a guess")
    lines = [Text.assemble((model.id, "bold"), ": ", ", ".join(fact for fact in facts if fact))]
    if model.aliases:
        lines.append(Text(f"also called {', '.join(model.aliases)}"))
    lines += [part for param, spec in _ordered(model) for part in _param_lines(param, spec, 0)]
    remarks = [*(rule.text for rule in model.rules), *model.notes]
    lines += [Text(f"- {remark}") for remark in remarks]
    if to_terminal():
        console = _console()
        for line in lines:
            console.print(line)
    else:
        standard = Standard()
        for line in lines:
            standard.line(line.plain)
    return 0


def _ordered(model: Model) -> list[tuple[str, ParamSpec]]:
    """Required ones first, else as documented."""
    return sorted(model.params.items(), key=lambda item: not item[1].required)


def _param_lines(name: str, spec: ParamSpec, depth: int) -> list[Text]:
    about = [spec.type]
    if spec.required:
        about.append("required")
    allowed = spec.allowed or (spec.items.allowed if spec.items is not None else "")
    if allowed:
        about.append(allowed if len(allowed) <= VALUES_SHOWN else allowed[:VALUES_SHOWN] + " ...")
    if spec.default is not None:
        about.append(f"default {_json_like(spec.default)}")
    if spec.aliases:
        about.append(f"also called {', '.join(spec.aliases)}")
    line = Text("  " * (depth + 1)).append(name, "cyan").append(f"  {'; '.join(about)}")
    if spec.note:
        line.append(f"  ({clean(spec.note)})", "dim")
    inner = [part for key, value in spec.properties.items() for part in _param_lines(key, value, depth + 1)]
    return [line, *inner]


def _json_like(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)
