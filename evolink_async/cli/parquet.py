"""Reading requests from a Parquet file, a row group after the other. Needs the extra `parquet`.

The columns mean what they mean in CSV. Values keep the types that they have in the file; a null is "not given".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import IO, TYPE_CHECKING, Any

from evolink_async.catalog import get_model
from evolink_async.cli.entries import BadInput, Defaults, Entry, columns_of, convert, is_column, json_or, request_from
from evolink_async.errors import EvoLinkError

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 1000
_BUFFER = 2**20  # bytes of each column that are read ahead
_PANDAS_INDEX = "__index_level_"  # how pandas names the index of a frame: no parameter
_ADVICE = {
    "timestamp": "cast it to text",
    "date": "cast it to text",
    "time": "cast it to text",
    "duration": "cast it to a number of seconds",
    "decimal": "cast it to a float or to text",
    "binary": "give links, or text",
    "map": "make it a struct",
}


def parquet_entries(file: IO[bytes], name: str, defaults: Defaults) -> Iterator[Entry]:
    """A row is an entry, counted from 1. Raises `BadInput` for what is no Parquet file, or holds what JSON lacks."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise BadInput(
            f"to read Parquet {error.name} is needed, which is not installed: pip install 'evolink-async[parquet]'"
        ) from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file, buffer_size=_BUFFER, pre_buffer=False)
        schema = table.schema_arrow
        chosen = [index for index, column in enumerate(schema.names) if not column.startswith(_PANDAS_INDEX)]
        names = [schema.names[index] for index in chosen]
        columns = _columns(names, name)
        readers = [_reader(schema.field(index).type, f"{name}: column {schema.names[index]}") for index in chosen]
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=names, use_threads=False):
            values = [column.to_pylist() for column in batch.columns]
            for cells in zip(*values, strict=True):
                row += 1
                fields = {
                    column: read(cell)
                    for column, read, cell in zip(columns, readers, cells, strict=True)
                    if cell is not None and not (isinstance(cell, str) and not cell.strip())
                }
                if fields:
                    yield _entry(row, fields, defaults)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        where = f", after row {row:,}" if row else ""
        raise BadInput(f"{name} cannot be read as Parquet{where}: {str(error).splitlines()[0][:300]}") from None


def _columns(names: list[str], name: str) -> list[str]:
    for column in names:
        if not is_column(column):
            raise BadInput(
                f"{name}: a column is named after a parameter, such as prompt; {column[:60]!r} is no such name"
            )
    if not names:
        raise BadInput(f"{name} has no columns")
    return columns_of(names, name)


def _reader(kind: pyarrow.DataType, what: str) -> Callable[[Any], Any]:
    """What makes a value of this type one of JSON. Raises `BadInput` for a type that JSON lacks."""
    from pyarrow import types

    if types.is_dictionary(kind):  # pandas' categories
        return _reader(kind.value_type, what)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        read = _reader(kind.value_type, what)
        return lambda values: [None if value is None else read(value) for value in values]
    if types.is_struct(kind):
        readers = {field.name: _reader(field.type, f"{what}.{field.name}") for field in kind}
        return lambda value: {
            member: readers[member](inner) for member, inner in value.items() if inner is not None
        }  # a member that another row has: not given in this one
    plain = types.is_string(kind) or types.is_large_string(kind) or types.is_boolean(kind) or types.is_null(kind)
    if plain or types.is_integer(kind) or types.is_floating(kind) or str(kind) == "string_view":
        return lambda value: value
    advice = next((advice for word, advice in _ADVICE.items() if word in str(kind)), "cast it to text")
    raise BadInput(f"{what} is of type {kind}, which a request cannot hold: {advice}, or leave the column out")


def _entry(row: int, fields: dict[str, Any], defaults: Defaults) -> Entry:
    model = fields.get("model", defaults.model)
    wanted = {column: _value(model, column, value) for column, value in fields.items()}
    try:
        request, warnings = request_from(wanted, defaults)
    except EvoLinkError as error:
        return Entry(row, reason=error.message, data=_writable(wanted))
    return Entry(row, request, data=wanted, warnings=warnings)


def _value(model: Any, column: str, value: Any) -> Any:
    """The value as the parameter's type, where that is another than the column's."""
    if column == "key":
        whole = _whole(value)
        return str(whole) if isinstance(whole, int) and not isinstance(whole, bool) else _stripped(whole)
    if column in ("model", "kind"):
        return _stripped(value)
    if column == "prompt":
        return value
    if column == "metadata":
        return json_or(value, value) if isinstance(value, str) else value
    known = get_model(model) if isinstance(model, str) else None
    spec = None if known is None else known.params.get(column)
    if isinstance(value, str):  # a text of an unknown parameter is meant as it stands
        return convert(model, column, value) if spec is not None or column.endswith("_urls") else value
    if spec is not None and "number" not in spec.types:
        return _whole(value)
    return value


def _whole(value: Any) -> Any:
    """3 for 3.0: whole numbers with gaps are floats in pandas."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stripped(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _writable(value: Any) -> Any:
    """The value with NaN and infinity as text, so that a line of JSON can hold it."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {name: _writable(inner) for name, inner in value.items()}
    return [_writable(inner) for inner in value] if isinstance(value, list) else value
