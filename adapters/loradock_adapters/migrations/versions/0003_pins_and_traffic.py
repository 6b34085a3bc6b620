"""Names whose adapters keep their slot; and how much each adapter was asked, hour by hour, for `loradock plan`."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0003"
down_revision: str | None = "0002"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.create_table(
        "pins",
        sa.Column("name", sa.String(96), sa.ForeignKey("models.name"), primary_key=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "traffic",
        sa.Column("hour", sa.Integer, primary_key=True),
        sa.Column("digest", sa.String(71), primary_key=True),
        sa.Column("requests", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "traffic_hours",
        sa.Column("hour", sa.Integer, primary_key=True),
        sa.Column("peak_adapters", sa.Integer, nullable=False),
    )


def downgrade() -> None:
    op.drop_table("traffic_hours")
    op.drop_table("traffic")
    op.drop_table("pins")
