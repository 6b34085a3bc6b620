"""Which base each version was published for; null for those from before, which the next start of a server claims."""

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: Sequence[str] | None = None
depends_on: Sequence[str] | None = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("base", sa.JSON, nullable=True))


def downgrade() -> None:
    op.drop_column("versions", "base")
