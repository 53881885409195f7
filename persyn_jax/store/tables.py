"""Records as Parquet: the schema comes from the dataclass, the bytes from the records alone.

Anything that reads Parquet opens the files, `datasets.load_dataset("parquet", data_files=...)` too
(unless a table has no rows).
"""

import types
import typing
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from persyn_jax.config import ConfigError
from persyn_jax.store.files import writing

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Record = TypeVar("Record", bound="DataclassInstance")

_GROUP_ROWS = 10_000
_SCALARS = {str: pa.string(), float: pa.float64(), int: pa.int64(), bool: pa.bool_()}


def write_records(path: Path, records: Iterable[Record], record_type: type[Record]) -> None:
    """Writes `records`, all of one dataclass, atomically; equal records give equal bytes.

    They are taken and written a row group at a time, so that no more of them need be in memory.
    Raises ConfigError naming `path`: a value that is not of its field's type, text with a lone
    surrogate, disk full.
    """
    schema = schema_of(record_type)
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    rest = iter(records)
    try:
        with writing(path) as file, pq.ParquetWriter(file, schema, **options) as writer:
            group = list(islice(rest, _GROUP_ROWS))
            while True:
                writer.write_table(_table(group, schema))
                if not (group := list(islice(rest, _GROUP_ROWS))):
                    break
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise ConfigError(f"{path}: cannot hold these records: {_one_line(error)}") from None


def _table(records: list[Record], schema: pa.Schema) -> pa.Table:
    columns = {name: [getattr(record, name) for record in records] for name in schema.names}
    return pa.Table.from_pydict(columns, schema=schema)


def read_records(path: Path, record_type: type[Record]) -> list[Record]:
    """The records in the file at `path`, in order.

    Raises ConfigError naming `path`: no such file, damaged file, records of another kind.
    """
    return list(iterate_records(path, record_type))


def iterate_records(path: Path, record_type: type[Record], **equal: str) -> Iterator[Record]:
    """The same one after the other, a row group in memory at a time; raises when it gets there.

    equal: only the records with these values, by the names of their fields.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            metadata = file.metadata
            rows = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
            # The pages carry checksums, the row counts at the end of the file do not.
            _check_rows(path, metadata.num_rows, sum(rows))
            _check_schema(path, file.schema_arrow, record_type)
            for group, count in enumerate(rows):
                table = file.read_row_group(group)
                _check_rows(path, table.num_rows, count)
                for name, value in equal.items():
                    table = table.filter(pc.call_function("equal", [table[name], value]))
                for batch in table.to_batches(max_chunksize=_GROUP_ROWS):
                    yield from (record_type(**row) for row in batch.to_pylist())
    except ConfigError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise ConfigError(f"{path}: missing, damaged or not Parquet: {_one_line(error)}") from None


def _check_rows(path: Path, one: int, other: int) -> None:
    if one != other:
        raise ConfigError(f"{path}: damaged: its row counts disagree")


def _check_schema(path: Path, found: pa.Schema, record_type: type) -> None:
    schema = schema_of(record_type)
    if not found.equals(schema):
        difference = sorted(set(found) ^ set(schema), key=lambda column: column.name)
        columns = ", ".join(dict.fromkeys(column.name for column in difference))
        raise ConfigError(
            f"{path}: holds no {record_type.__name__} records: columns that differ: {columns}"
        )


def schema_of(record_type: type) -> pa.Schema:
    """The Arrow schema of a record dataclass; `| None` in an annotation makes a field nullable.

    Raises TypeError for an annotation that no record uses.
    """
    hints = typing.get_type_hints(record_type)
    return pa.schema([_column(name, hint) for name, hint in hints.items()])


def _column(name: str, hint: Any) -> pa.Field:
    arguments = typing.get_args(hint)
    if isinstance(hint, types.UnionType) and len(arguments) == 2 and arguments[1] is type(None):
        return pa.field(name, _arrow_type(arguments[0]), nullable=True)
    return pa.field(name, _arrow_type(hint), nullable=False)


def _arrow_type(hint: Any) -> pa.DataType:
    if hint in _SCALARS:
        return _SCALARS[hint]
    if typing.get_origin(hint) is Literal:
        return pa.string()
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return pa.list_(_column("item", item))
    if typing.is_typeddict(hint):
        fields = typing.get_type_hints(hint)
        return pa.struct([_column(name, field) for name, field in fields.items()])
    raise TypeError(f"no Parquet column type for the annotation {hint}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
