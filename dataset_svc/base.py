"""What all tables share: naming, Python-to-SQL types, and columns with a fixed set of values.

- Names of constraints follow from their table and columns, so that migrations can name them.
"""

from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, MetaData
from sqlalchemy.dialects.postgresql import ARRAY, JSON
from sqlalchemy.orm import DeclarativeBase
from sqlalchemy.types import LargeBinary

from dataset_svc.columns import AnyText

Document = dict[str, Any]


def one_of(column: str, values: tuple[str, ...]) -> CheckConstraint:
    """A column has one of these values."""
    allowed = ", ".join(f"'{value}'" for value in values)
    return CheckConstraint(f"{column} IN ({allowed})", name=f"{column}_known")


class Base(DeclarativeBase):
    """Declarative base: naming convention and Python-to-SQL types."""

    metadata = MetaData(
        naming_convention={
            "pk": "pk_%(table_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 (SQLAlchemy's own declaration)
        str: AnyText(),
        int: BigInteger(),
        bytes: LargeBinary(),
        datetime: DateTime(timezone=True),
        Document: JSON(none_as_null=True),
        list[str]: ARRAY(AnyText()),
    }
