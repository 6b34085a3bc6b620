"""Names that point at immutable versions."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "models",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("current_number", sa.Integer, nullable=True),
        sa.Column("last_number", sa.Integer, nullable=False),
    )
    op.create_table(
        "versions",
        sa.Column("name", sa.String(96), sa.ForeignKey("models.name"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("placement", sa.String(16), nullable=False),
        sa.Column("reasons", sa.JSON, nullable=False),
        sa.Column("rank", sa.Integer, nullable=True),
        sa.Column("size_bytes", sa.BigInteger, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("chat_template", sa.Text, nullable=True),
        sa.Column("stop_token_ids", sa.JSON, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
    )
    op.create_index("versions_by_digest", "versions", ["digest"])


def downgrade() -> None:
    op.drop_table("versions")
    op.drop_table("models")
