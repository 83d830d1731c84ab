"""Read the rows of parquet files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from halfstep.launcher.data.row_fields import Row, Wanted, no_field, text_of
from halfstep.launcher.errors import RequestError

_PARQUET_ROWS = 1024


def rows(path: Path, wanted: Wanted) -> Iterator[Any]:
    """Yield what is wanted of each row. Raises RequestError for a file that cannot be read further."""
    number = 0
    with _parquet(path) as table:
        names = table.schema_arrow.names
        # Rows that have none of the fields are asked all the same: what they have is said.
        columns = [name for name in wanted.fields if name in names] or names
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield wanted.take(row, f"{path}, row {number}", f"row {number}")


def texts(path: Path, field: str) -> Iterator[Row]:
    """Yield the text in a field of each row; `meta.text` names a field inside another. Raises as `rows` does."""
    number = 0
    with _parquet(path) as table:
        steps = _steps(table.schema_arrow, field, path)
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS, columns=[field]):
            for value in batch.column(0):
                number += 1
                inside = _as_python(value)
                for step in steps:
                    inside = inside.get(step) if isinstance(inside, dict) else None
                yield text_of({field: inside}, field, f"{path}, row {number}", f"row {number}")


@contextlib.contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a parquet file; raises RequestError, now or while it is read, for one that cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            yield table
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise RequestError(
            f"{path.name} is not a readable parquet file: {reason}", where=str(path), fix="copy it again"
        ) from None


def _steps(schema: Any, field: str, path: Path) -> list[str]:
    """Return the names that lead to a field from its column, after looking that it is there, once."""
    columns = schema.get_all_field_indices(field)
    if len(columns) > 1:
        raise RequestError(f"{path.name} has {len(columns)} columns {field!r}", where=str(path), fix="rename one")
    if columns:
        return []
    row, (root, *steps) = _as_row(schema), field.split(".")
    inside: Any = row
    for part in (root, *steps):
        if not isinstance(inside, dict) or part not in inside:
            raise no_field(row, field, str(path), path.name)
        inside = inside[part]
    return steps


def _as_row(fields: Any) -> dict[str, Any]:
    """Return the names of a schema or struct as a row of them."""
    import pyarrow

    return {each.name: _as_row(each.type) if pyarrow.types.is_struct(each.type) else None for each in fields}


def _as_python(value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.as_buffer().to_pybytes() if hasattr(value, "as_buffer") else None
