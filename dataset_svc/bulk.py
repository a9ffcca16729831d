"""Many rows at once: COPY into a table, and updates by arrays.

- A row goes through the same column types as one that SQLAlchemy inserts: what comes back is equal.
- COPY is part of the session's transaction.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, cast

import psycopg
from psycopg import sql
from sqlalchemy import ARRAY, FromClause, Table, Text, TypeDecorator, func, literal
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.types import JSON, TypeEngine

from dataset_svc.columns import AnyText, stored_text
from dataset_svc.models import Base

_DIALECT: Any = postgresql.dialect()  # type: ignore[no-untyped-call]
TEXT = Text()
Encoder = Callable[[Any], Any]


async def copy_rows(
    session: AsyncSession, model: type[Base], rows: Sequence[Mapping[str, object]]
) -> None:
    """Insert rows of one table; all rows have the same columns in the same order."""
    if not rows:
        return
    table = cast(Table, model.__table__)
    names = list(rows[0])
    encoders = [
        (place, encode)
        for place, name in enumerate(names)
        if (encode := _encoder(table, name)) is not None
    ]
    columns = sql.SQL(", ").join(map(sql.Identifier, names))
    statement = sql.SQL("COPY {} ({}) FROM STDIN").format(sql.Identifier(table.name), columns)
    connection = await (await session.connection()).get_raw_connection()
    driver: psycopg.AsyncConnection[Any] = cast(Any, connection.driver_connection)
    try:
        async with driver.cursor() as cursor, cursor.copy(statement) as copy:
            # Row by row without a coroutine for each; what is full of them goes out.
            write = copy.formatter.write_row
            for row in rows:
                encoded = list(row.values())
                for place, encode in encoders:
                    encoded[place] = encode(encoded[place])
                if full := write(encoded):
                    await copy.write(full)
    except psycopg.IntegrityError as error:
        raise IntegrityError("COPY", None, error) from error
    except psycopg.Error as error:
        raise DBAPIError("COPY", None, error) from error


def values(name: str, **columns: tuple[Sequence[Any], "TypeEngine[Any]"]) -> FromClause:
    """A table of values, one array for each column, to join an UPDATE with."""
    arrays = [literal(list(items), postgresql.ARRAY(kind)) for items, kind in columns.values()]
    return func.unnest(*arrays).table_valued(*columns, name=name).render_derived()


@cache
def _encoder(table: Table, name: str) -> Encoder | None:
    kind = table.columns[name].type
    if isinstance(kind, JSON):
        return lambda value: None if value is None else json.dumps(value)
    if isinstance(kind, AnyText):
        return stored_text
    if isinstance(kind, TypeDecorator):
        return lambda value: kind.process_bind_param(value, _DIALECT)
    if isinstance(kind, ARRAY) and isinstance(kind.item_type, AnyText):
        return lambda value: [stored_text(one) for one in value]
    return None
