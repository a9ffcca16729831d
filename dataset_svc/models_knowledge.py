"""The tables of the knowledge base, beside those of `models`; the same rules hold."""

from datetime import datetime

from sqlalchemy import CheckConstraint, ForeignKey, Index, func
from sqlalchemy.orm import Mapped, mapped_column

from dataset_svc.models import TENANTS, Document, one_of
from dataset_svc.models import Base as Base

KNOWLEDGE_KINDS = ("reference-fix", "trajectory", "changelog")


class Knowledge(Base):
    """An error and what repaired it in a training task, or a fact about a package."""

    __tablename__ = "knowledge"
    __table_args__ = (
        one_of("kind", KNOWLEDGE_KINDS),
        CheckConstraint("(kind = 'changelog') = (task_id IS NULL)", name="task_of_fix"),
        Index(None, "task_id"),
        Index(None, "signature"),
        Index("ix_knowledge_tenant", "tenant", postgresql_where=TENANTS),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(server_default="")
    """Whose it is; empty: nobody's."""
    kind: Mapped[str]
    task_id: Mapped[str | None] = mapped_column(ForeignKey("tasks.id", ondelete="CASCADE"))
    trajectory_id: Mapped[str]
    mode: Mapped[str]
    error: Mapped[str]
    signature: Mapped[str]
    culprit: Mapped[str]
    package_family: Mapped[str]
    families: Mapped[list[str]]
    """Of the culprit and of every package that the fix moved."""
    length: Mapped[int]
    """Words in it."""
    document: Mapped[Document]
    create_time: Mapped[datetime] = mapped_column(server_default=func.now())


class KnowledgeWord(Base):
    """How often a word is in an item."""

    __tablename__ = "knowledge_words"
    __table_args__ = (Index(None, "item_id"),)

    word: Mapped[str] = mapped_column(primary_key=True)
    item_id: Mapped[str] = mapped_column(
        ForeignKey("knowledge.id", ondelete="CASCADE"), primary_key=True
    )
    count: Mapped[int]


class KnowledgeUse(Base):
    """A trajectory that was shown an item, and whether it solved its task honestly."""

    __tablename__ = "knowledge_uses"

    item_id: Mapped[str] = mapped_column(
        ForeignKey("knowledge.id", ondelete="CASCADE"), primary_key=True
    )
    trajectory_id: Mapped[str] = mapped_column(primary_key=True)
    won: Mapped[bool]
