"""`models`: the catalogue for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evolink_async.catalog import Model, all_models, get_model, nearest
from evolink_async.cli.outputs import Standard, to_terminal
from evolink_async.cli.text import clean
from evolink_async.errors import InvalidRequestError

if TYPE_CHECKING:
    from evolink_async.catalog import ParamSpec

ROOM_FOR_FACTS = 34  # columns beside an id
VALUES_SHOWN = 200  # characters of allowed values before they are cut


def show_models(kind: str | None, *, legacy: bool, as_json: bool) -> int:
    """A table on a terminal, lines of tab-separated cells elsewhere."""
    chosen = [model for model in all_models() if kind in (None, model.kind) and (legacy or not model.legacy)]
    standard = Standard()
    if as_json:
        for model in chosen:
            standard.json(model_line(model))
        return 0
    if not to_terminal():
        for model in chosen:
            standard.line("\t".join(_cells(model)))
        return 0
    console = _console()
    longest = max((len(model.id) for model in chosen), default=0)
    if console.width < longest + ROOM_FOR_FACTS:
        for model in chosen:  # an id that is broken over two lines cannot be copied
            facts = ", ".join(cell for cell in _cells(model)[1:] if cell)
            style = "dim" if model.legacy else ""
            console.print(Text(model.id, style or "bold"), soft_wrap=True)
            console.print(Padding(Text(facts, style), (0, 0, 0, 2), expand=False))
    else:
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", pad_edge=False)
        for name in ("model", "kind", "billed", "takes", ""):
            table.add_column(name, no_wrap=name == "model", overflow="fold")
        for model in chosen:
            table.add_row(*(Text(cell, style="dim" if model.legacy else "") for cell in _cells(model)))
        console.print(table)
    console.print(Text(f"{len(chosen)} models; what one takes: evolink-async models ID", style="dim"))
    return 0


def model_line(model: Model) -> dict[str, Any]:
    """What --json says of a model in the list."""
    return {
        "model": model.id,
        "kind": model.kind,
        "endpoint": model.endpoint,
        "billing_rule": model.billing_rule,
        "estimated_time": model.estimated_time,
        "legacy": model.legacy,
        "documented": model.documented,
        "aliases": model.aliases,
    }


def param_line(spec: ParamSpec) -> dict[str, Any]:
    """What --json says of a parameter."""
    return {
        "type": spec.type,
        "required": spec.required,
        "allowed": spec.allowed,
        "default": spec.default,
        "aliases": spec.aliases,
        "note": spec.note,
        "items": None if spec.items is None else param_line(spec.items),
        "properties": {name: param_line(inner) for name, inner in spec.properties.items()},
    }


def _cells(model: Model) -> list[str]:
    billed = (model.billing_rule or "").replace("_", " ")
    takes = "" if model.estimated_time is None else f"about {model.estimated_time} s"
    return [model.id, model.kind, billed, takes, "legacy" if model.legacy else ""]


def show_model(name: str, *, as_json: bool) -> int:
    """What a model takes. Raises `InvalidRequestError` for one that isn't known."""
    model = get_model(name)
    if model is None:
        near = " or ".join(nearest(name))
        hint = f"did you mean {near}?" if near else "`evolink-async models` lists them"
        raise InvalidRequestError(f"no model {clean(name)!r} in the catalogue; {hint}", param="model")
    remarks = [*(rule.text for rule in model.rules), *model.notes]
    if as_json:
        params = {param: param_line(spec) for param, spec in model.params.items()}
        Standard().json(model_line(model) | {"params": params, "remarks": remarks})
        return 0
    facts = [model.kind, (model.billing_rule or "").replace("_", " ")]
    facts.append("" if model.estimated_time is None else f"about {model.estimated_time} s")
    facts.append("in older documents only" if model.legacy else "")
    facts.append("" if model.documented else "no page found, so the parameters are a guess")
    lines = [(0, Text.assemble((model.id, "bold"), ": ", ", ".join(fact for fact in facts if fact)))]
    if model.aliases:
        lines.append((0, Text(f"also called {', '.join(model.aliases)}")))
    lines += [part for param, spec in _ordered(model) for part in _param_lines(param, spec, 1)]
    lines += [(0, Text(f"- {remark}")) for remark in remarks]
    if to_terminal():
        console = _console()
        for depth, line in lines:  # what does not fit goes on a little further in
            hanging = line.wrap(console, max(20, console.width - 2 * depth - 4))
            for number, part in enumerate(hanging):
                console.print(Padding(part, (0, 0, 0, 2 * depth + (4 if number else 0)), expand=False))
    else:
        standard = Standard()
        for depth, line in lines:
            standard.line("  " * depth + line.plain)
    return 0


def _ordered(model: Model) -> list[tuple[str, ParamSpec]]:
    """Required ones first, else as documented."""
    return sorted(model.params.items(), key=lambda item: not item[1].required)


def _param_lines(name: str, spec: ParamSpec, depth: int) -> list[tuple[int, Text]]:
    """A line about the parameter and those about what is in it, each with how deep it stands."""
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
    line = Text().append(name, "cyan").append(f"  {'; '.join(about)}")
    if spec.note:
        line.append(f"  ({clean(spec.note)})", "dim")
    inner = [part for key, value in spec.properties.items() for part in _param_lines(key, value, depth + 1)]
    return [(depth, line), *inner]


def _json_like(value: object) -> str:
    return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def _console() -> Console:
    return Console(markup=False, emoji=False, highlight=False)
