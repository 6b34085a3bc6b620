"""Tags and shares of traffic for a name's versions; and what else is known of a version: its proof, what was repaired
in it, where it came from and who published it."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0004"
down_revision: str | None = "0003"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None

_NEW = {"proof": sa.JSON, "repairs": sa.JSON, "source": sa.Text, "publisher": sa.Text}


def upgrade() -> None:
    for name, kind in _NEW.items():
        op.add_column("versions", sa.Column(name, kind, nullable=True))
    op.create_table(
        "tags",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("tag", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
    )
    op.create_table(
        "splits",
        sa.Column("name", sa.String(96), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("weight", sa.Integer, nullable=False),
        sa.ForeignKeyConstraint(["name", "number"], ["versions.name", "versions.number"]),
    )


def downgrade() -> None:
    op.drop_table("splits")
    op.drop_table("tags")
    for name in _NEW:
        op.drop_column("versions", name)
